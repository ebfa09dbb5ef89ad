"""How gunicorn serves app.py. It reads this file by itself, from the folder that it is started in."""

import os

# Loopback: whoever can reach the backend itself needs no scope.
bind = f"127.0.0.1:{os.environ.get('BACKEND_PORT', '9000')}"
wsgi_app = "app:app"

# Threads, because the default worker closes each connection after one answer.
worker_class = "gthread"
workers = 2
threads = 8

# Above upstream.reuse_idle_seconds of the gate.
keepalive = 5
# So long may go on what is in flight when gunicorn ends; above upstream.response_timeout_seconds.
graceful_timeout = 30

# Trust no X-Forwarded-* and no SCRIPT_NAME header. By default gunicorn believes what connects from loopback.
# Here that is the gate, which passes on what clients sent: theirs would decide which view a path leads to.
forwarded_allow_ips = ""
# x_scope_id is not x-scope-id: a header with "_" is dropped. (The gate refuses such twins of what it judges.)
header_map = "drop"

accesslog = None
loglevel = "warning"
control_socket_disable = True

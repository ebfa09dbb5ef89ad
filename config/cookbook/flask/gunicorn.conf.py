"""The settings of gunicorn for app.py. gunicorn reads this file from the folder in which it starts."""

import os

# Loopback, because a client that reaches the backend directly needs no scope.
bind = f"127.0.0.1:{os.environ.get('BACKEND_PORT', '9000')}"
wsgi_app = "app:app"

# Threads, because the default worker closes each connection after one answer.
worker_class = "gthread"
workers = 2
threads = 8

# Above upstream.reuse_idle_seconds of the gate.
keepalive = 5
# The time that requests in flight have when gunicorn ends; above upstream.response_timeout_seconds.
graceful_timeout = 30

# Trust no X-Forwarded-* and no SCRIPT_NAME header. By default gunicorn trusts connections from loopback. Here
# the gate connects from loopback and forwards the headers of clients, which could then choose a view.
forwarded_allow_ips = ""
# Drop headers with "_", because x_scope_id is not x-scope-id. (The gate refuses twins of its headers.)
header_map = "drop"

accesslog = None
loglevel = "warning"
control_socket_disable = True

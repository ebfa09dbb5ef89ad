"""A recovery backend in plain Python. It executes every request, fails if a request says so, and sends a
greeting over a WebSocket."""

import base64
import hashlib
import json
import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WEBSOCKET_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3


class Backend(BaseHTTPRequestHandler):
    """One connection. Its answers show the path, tenant and request id that it received."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.headers.get("Upgrade", "").lower() == "websocket":
            self.greet()
        else:
            self.answer({"path": self.path, "tenant": self.headers.get("X-Tenant")})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        # ... here the action is executed ...
        done = {"done": asked["action"], "request_id": self.headers["X-Request-Id"]}
        self.answer(done, 503 if asked.get("parameters", {}).get("fail") else 200, cost="0.05")

    def answer(self, body: dict[str, object], status: int = 200, cost: str | None = None) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if cost is not None:
            self.send_header("X-Recovery-Cost-USD", cost)
        self.end_headers()
        self.wfile.write(text)

    def greet(self) -> None:
        """Accept the WebSocket, send one message, and close it."""
        accepted = hashlib.sha1((self.headers["Sec-WebSocket-Key"] + WEBSOCKET_GUID).encode()).digest()
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(accepted).decode())
        self.end_headers()
        self.wfile.write(b"\x81\x05hello\x88\x00")
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Do not log, because the gate does."""


signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
with ThreadingHTTPServer(("127.0.0.1", int(os.environ.get("BACKEND_PORT", "9000"))), Backend) as server:
    server.daemon_threads = True
    server.serve_forever()

"""A backend that recovers agents, in plain Python. It executes every request."""

import json
import os
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SECONDS = {"retry_agent": 0.0, "restart_agent": 0.1, "rebuild_memory": 2.0}
healthy: set[str] = set()  # the agents that were restarted; a retry does not help


class Backend(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        agent = self.path.removeprefix("/api/v1/agents/")
        self.answer(200, {"agent": agent, "healthy": agent in healthy})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.path.endswith("/recovery/execute"):
            self.answer(404, {"detail": "no such path"})
            return
        time.sleep(SECONDS[asked["action"]])
        if asked["action"] == "restart_agent":
            healthy.update(asked["target_agents"])
        self.answer(200, {"done": asked["action"]}, cost="0.03")

    def answer(self, status: int, body: dict[str, object], cost: str | None = None) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if cost is not None:
            self.send_header("X-Recovery-Cost-USD", cost)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Do not log, because the gate does."""

    def handle(self) -> None:
        """Ignore the error that follows when the gate closes the connection after its timeout."""
        try:
            super().handle()
        except ConnectionError:
            self.close_connection = True


signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
with ThreadingHTTPServer(("127.0.0.1", int(os.environ.get("BACKEND_PORT", "9000"))), Backend) as server:
    server.daemon_threads = True
    server.serve_forever()

"""The authorization service behind nginx and Envoy: FastAPI, and SQLite with one durable commit each time.

    python -m tests.bench.peers.authorizer --port 8000 --database scopes.db

It does what a service of this kind has to do and no more: it checks the scope that the headers name, spends
one attempt, and writes a decision record, in one transaction that is on disk before it answers. All
statements of a transaction run in one step on one thread, because that is faster than awaiting each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastapi import FastAPI, Request, Response

from tests.bench.peers.serving import serve

SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
CREATE TABLE scopes (
  scope_id TEXT PRIMARY KEY, incident_id TEXT NOT NULL, action TEXT NOT NULL,
  max_attempts INTEGER NOT NULL, attempts INTEGER NOT NULL, expires_at REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE decisions (
  sequence INTEGER PRIMARY KEY, decision_id TEXT NOT NULL, scope_id TEXT NOT NULL, incident_id TEXT NOT NULL,
  action TEXT NOT NULL, outcome TEXT NOT NULL, created_at REAL NOT NULL
) STRICT;
"""


class Scopes:
    """The scopes and the decisions, on the one thread that uses the database."""

    def __init__(self, database: Path) -> None:
        self._connection = sqlite3.connect(database, isolation_level=None, check_same_thread=False)
        self._connection.executescript(SCHEMA)

    def issue(self, incident_id: str, action: str, max_attempts: int) -> str:
        scope_id = f"scope_{uuid.uuid4()}"
        values = (scope_id, incident_id, action, max_attempts, 0, time.time() + 3600)
        self._connection.execute("INSERT INTO scopes VALUES (?, ?, ?, ?, ?, ?)", values)
        return scope_id

    def authorize(self, scope_id: str, incident_id: str, action: str) -> str | None:
        """The id of the durable decision that allows it; None if it is refused."""
        now, decision_id = time.time(), str(uuid.uuid4())
        run = self._connection.execute
        run("BEGIN IMMEDIATE")
        try:
            spent = run(
                "UPDATE scopes SET attempts = attempts + 1 WHERE scope_id = ? AND incident_id = ?"
                " AND action = ? AND attempts < max_attempts AND expires_at > ?",
                (scope_id, incident_id, action, now),
            ).rowcount
            outcome = "selected" if spent else "blocked"
            run(
                "INSERT INTO decisions VALUES (NULL, ?, ?, ?, ?, ?, ?)",
                (decision_id, scope_id, incident_id, action, outcome, now),
            )
            run("COMMIT")
        except BaseException:
            run("ROLLBACK")
            raise
        return decision_id if spent else None


def application(database: Path) -> FastAPI:
    """The service on a database that does not exist yet."""
    scopes, thread = Scopes(database), ThreadPoolExecutor(1)
    app = FastAPI(openapi_url=None)

    @app.post("/scopes", status_code=201)
    async def issue(request: Request) -> dict[str, str]:
        asked = json.loads(await request.body())
        loop = asyncio.get_running_loop()
        terms = (asked["incident_id"], asked["action"], asked["max_attempts"])
        return {"scope_id": await loop.run_in_executor(thread, scopes.issue, *terms)}

    # nginx asks with GET and this path, Envoy with the request's method and its path behind this one.
    @app.api_route("/authorize{path:path}", methods=["GET", "POST"])
    async def authorize(request: Request) -> Response:
        loop, named = asyncio.get_running_loop(), request.headers
        scope_id, incident_id, action = named["x-scope-id"], named["x-incident-id"], named["x-action"]
        decision_id = await loop.run_in_executor(thread, scopes.authorize, scope_id, incident_id, action)
        if decision_id is None:
            return Response(status_code=403)
        return Response(headers={"x-decision-id": decision_id})

    return app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--database", type=Path, required=True)
    arguments = parser.parse_args()
    serve(application(arguments.database), arguments.port)


if __name__ == "__main__":
    main()

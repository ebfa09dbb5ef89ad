"""A gate as many would write it: FastAPI, SQLAlchemy for the record, httpx to the backend.

    python -m tests.bench.peers.fastapi_proxy --port 8000 --backend 9000 --database scopes.db

It reads the scope from the body, spends an attempt and writes a decision record in one transaction that is
on disk before the request goes on. The session is SQLAlchemy's synchronous one on one thread, because a hop
for each transaction is faster than the asynchronous session's hop for each statement.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI, Request, Response
from sqlalchemy import JSON, create_engine, event
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from sqlalchemy.pool import StaticPool

from tests.bench.peers.serving import serve

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}


class Base(DeclarativeBase):
    """The tables."""


class Scope(Base):
    """A scope, and how many attempts it has spent."""

    __tablename__ = "scopes"
    scope_id: Mapped[str] = mapped_column(primary_key=True)
    incident_id: Mapped[str]
    action: Mapped[str]
    max_attempts: Mapped[int]
    attempts: Mapped[int]
    expires_at: Mapped[float]


class Decision(Base):
    """One decision."""

    __tablename__ = "decisions"
    sequence: Mapped[int] = mapped_column(primary_key=True)
    decision_id: Mapped[str]
    scope_id: Mapped[str]
    outcome: Mapped[str]
    parameters: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[float]


def sessions(database: Path) -> sessionmaker[Session]:
    """Sessions on one connection to a new database; each commit is durable."""
    engine = create_engine(
        f"sqlite:///{database}", connect_args={"check_same_thread": False}, poolclass=StaticPool
    )

    @event.listens_for(engine, "connect")
    def _durable(connection: Any, record: object) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")

    Base.metadata.create_all(engine)
    return sessionmaker(engine, expire_on_commit=False)


class Scopes:
    """What the one thread that uses the database does there."""

    def __init__(self, database: Path) -> None:
        self._sessions = sessions(database)

    def issue(self, incident_id: str, action: str, max_attempts: int) -> str:
        scope = Scope(
            scope_id=f"scope_{uuid.uuid4()}",
            incident_id=incident_id,
            action=action,
            max_attempts=max_attempts,
            attempts=0,
            expires_at=time.time() + 3600,
        )
        with self._sessions.begin() as session:
            session.add(scope)
        return scope.scope_id

    def admit(self, asked: dict[str, Any]) -> str | None:
        """The id of the durable decision that allows it; None if it is refused."""
        decision_id, now = str(uuid.uuid4()), time.time()
        with self._sessions.begin() as session:
            scope = session.get(Scope, asked["scope_id"])
            allowed = (
                scope is not None
                and scope.incident_id == asked["incident_id"]
                and scope.action == asked["action"]
                and scope.attempts < scope.max_attempts
                and scope.expires_at > now
            )
            if allowed and scope is not None:
                scope.attempts += 1
            session.add(
                Decision(
                    decision_id=decision_id,
                    scope_id=asked["scope_id"],
                    outcome="selected" if allowed else "blocked",
                    parameters=asked["parameters"],
                    created_at=now,
                )
            )
        return decision_id if allowed else None


def application(database: Path, backend: str) -> FastAPI:
    """The gate in front of `backend`, a URL without a path, on a database that does not exist yet."""
    scopes, thread = Scopes(database), ThreadPoolExecutor(1)
    client = httpx.AsyncClient(
        base_url=backend,
        limits=httpx.Limits(max_connections=512, max_keepalive_connections=512, keepalive_expiry=60),
        timeout=30,
        trust_env=False,
    )
    app = FastAPI(openapi_url=None)

    @app.post("/scopes", status_code=201)
    async def issue(request: Request) -> dict[str, str]:
        asked = json.loads(await request.body())
        loop = asyncio.get_running_loop()
        terms = (asked["incident_id"], asked["action"], asked["max_attempts"])
        return {"scope_id": await loop.run_in_executor(thread, scopes.issue, *terms)}

    @app.post("/{path:path}")
    async def execute(request: Request) -> Response:
        body = await request.body()
        loop = asyncio.get_running_loop()
        decision_id = await loop.run_in_executor(thread, scopes.admit, json.loads(body))
        if decision_id is None:
            return Response(status_code=403)
        answer = await client.post(
            request.url.path, content=body, headers=end_to_end(request.headers.items())
        )
        headers = dict(end_to_end(answer.headers.items()))
        return Response(answer.content, answer.status_code, {**headers, "x-decision-id": decision_id})

    return app


def end_to_end(headers: Any) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers if name.lower() not in HOP_BY_HOP]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--backend", type=int, required=True)
    parser.add_argument("--database", type=Path, required=True)
    arguments = parser.parse_args()
    serve(application(arguments.database, f"http://127.0.0.1:{arguments.backend}"), arguments.port)


if __name__ == "__main__":
    main()

"""A recovery backend in Flask with its own interface.

Two processes serve it, so it keeps its records in a database.
"""

import os
import sqlite3
from contextlib import closing

from flask import Flask, Response, jsonify, request

DATABASE = os.environ.get("EXECUTIONS_DB", "executions.db")
ACTIONS = ("retry_agent", "restart_agent")


def connect() -> sqlite3.Connection:
    """A connection for one request. Every change is on disk before its answer."""
    connection = sqlite3.connect(DATABASE, timeout=5)
    connection.execute(
        "CREATE TABLE IF NOT EXISTS executions"
        " (decision_id TEXT PRIMARY KEY, scope_id TEXT, incident TEXT, action TEXT) STRICT"
    )
    return connection


app = Flask(__name__)


@app.get("/incidents/<incident>")
def show(incident: str) -> Response:
    """Not gated: requests pass through."""
    with closing(connect()) as database:
        rows = database.execute(
            "SELECT action FROM executions WHERE incident = ? ORDER BY rowid", (incident,)
        )
        return jsonify(incident=incident, executed=[action for (action,) in rows])


@app.post("/incidents/<incident>/actions/<action>/run")
def run(incident: str, action: str) -> tuple[Response, int]:
    """Execute once for each decision of the gate, and report the cost in the body."""
    if action not in ACTIONS:
        return jsonify(error="no such action"), 404
    decision_id = request.headers.get("Scopegate-Decision-Id")
    if decision_id is None:
        return jsonify(error="this did not come through the gate"), 400
    claim = (decision_id, request.headers["Scopegate-Scope-Id"], incident, action)
    with closing(connect()) as database, database:
        # Inserted before the execution, so that a second request under the same decision fails here.
        claimed = database.execute("INSERT INTO executions VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING", claim)
    if claimed.rowcount == 0:
        return jsonify(error="executed before", decision_id=decision_id), 409
    # ... here the agent is restarted ...
    return jsonify(done=action, agents=request.get_json().get("agents", []), cost_usd=0.03), 200

"""How a backend reports an execution: one line of JSON on its standard output."""

from __future__ import annotations

import json
import os
import sys
from typing import Any, Protocol

MARK = "EXECUTED "
PATHS = ("/api/v1/recovery/execute", "/recovery/execute")


class Headers(Protocol):
    """The headers of a request, found by any case."""

    def get(self, name: str, /) -> str | None: ...


def executed(headers: Headers, body: bytes) -> str:
    """Report that a request executes. Returns what to answer."""
    try:
        facts = json.loads(body)
    except ValueError:
        facts = None
    report: dict[str, Any] = {
        "case": headers.get("X-Case"),
        "decision_id": headers.get("Scopegate-Decision-Id"),
        "facts": facts if isinstance(facts, dict) else {},
    }
    line = f"{MARK}{json.dumps(report)}\n"
    os.write(sys.stdout.fileno(), line.encode())  # at once, since several threads report
    return "executed"

"""How log lines look, as JSON or as text, and where they go.

A scope_id in any line, such as one in a traceback or in the message of a library, has its short form.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

import orjson

from sidecar.core.shortid import shortened, shortened_bytes
from sidecar.telemetry.events import LogEvent

_ORDINARY = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_DELETE = 0x7F  # the one character of ASCII that `json` escapes and orjson does not


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """The members that a record has beside those of `logging`. Names with `_` first are private."""
    return {name: value for name, value in vars(record).items() if name not in _ORDINARY and name[0] != "_"}


class JsonFormatter(logging.Formatter):
    """One JSON object, in ASCII: level, logger, message, exc_info, stack_info, fields, time."""

    def format(self, record: logging.LogRecord) -> str:
        members = {"level": record.levelname, "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            members["exc_info"] = self.formatException(record.exc_info)
        elif record.exc_text:
            members["exc_info"] = record.exc_text
        if record.stack_info:
            members["stack_info"] = self.formatStack(record.stack_info)
        members |= _fields(record)
        return _dumped(members, datetime.fromtimestamp(record.created, UTC))


def event_line(event: LogEvent, fields: dict[str, Any], time: datetime) -> bytes:
    """The line of an event without arguments and traceback, as JsonFormatter formats it. It keeps `fields`.

    orjson is four times as fast as `json` and writes the same bytes for plain values in ASCII. Characters
    beyond ASCII it writes as they are; lone surrogates and integers above 64 bits it refuses.
    """
    fields["time"] = time
    try:
        line = orjson.dumps(fields)
    except orjson.JSONEncodeError:
        pass
    else:
        if line.isascii() and _DELETE not in line:
            return event.json_head + shortened_bytes(line[1:])
    return _dumped(event.members | fields, time).encode()


def _dumped(members: dict[str, Any], time: datetime) -> str:
    line = json.dumps({**members, "time": time.isoformat()}, default=str, separators=(",", ":"))
    return shortened(line)


class _TextFormatter(logging.Formatter):
    """`time level message key=value ...`, for people."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        head, newline, traceback = line.partition("\n")
        fields = "".join(
            f" {key}={value if isinstance(value, int | float) else json.dumps(value, default=str)}"
            for key, value in _fields(record).items()
            if value is not None
        )
        return shortened(f"{head}{fields}{newline}{traceback}")


def set_up_logging(
    format: Literal["json", "text"], level: str = "INFO", stream: TextIO | None = None
) -> None:
    """Send all logs of the process to `stream` (standard error by default), one line for each record."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(
        JsonFormatter()
        if format == "json"
        else _TextFormatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")
    )
    # Both formats show none of these, and looking them up takes time for each line.
    for unused in ("logThreads", "logProcesses", "logMultiprocessing", "logAsyncioTasks"):
        setattr(logging, unused, False)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # The sidecar's own log lines cover what these libraries report at INFO.
    for noisy in ("aiosqlite", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)

"""Logging never blocks a request: a thread writes the log lines, which reach it through a bounded queue.

Without it, a log pipe that is not read would block the event loop and the gate. Lines that do not fit into
the queue are dropped and counted.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from queue import SimpleQueue
from typing import Any

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry

from sidecar.telemetry.events import QUEUE_ALONE, EventQueue, LogEvent
from sidecar.telemetry.logs import JsonFormatter, event_line

MAX_WAITING_LINES = 10_000
LINES_A_WRITE = 256
# The thread gathers lines for this long, because waking it for each line costs the event loop more than
# formatting the line.
GATHER_SECONDS = 0.02
FLUSH_SECONDS = 1.0


class LogQueue(EventQueue):
    """Replaces a StreamHandler.

    Its thread writes to the file descriptor directly. A blocked write therefore holds no lock of a handler or
    a file, for which the end of the process would wait.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.dropped = 0
        self._reported = 0
        # Not the handler's own lock: `logging.shutdown` holds that while it waits for the thread in `flush`.
        self._counting = threading.Lock()
        self._descriptor = descriptor
        self._waiting: SimpleQueue[bytes | threading.Event] = SimpleQueue()
        threading.Thread(target=self._write_for_ever, name="scopegate-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        if self._waiting.qsize() >= MAX_WAITING_LINES:
            self._drop(1)
            return
        try:
            self._waiting.put(self._line(record))
        except Exception:  # as in the handlers of `logging`: a logging error must not reach the caller
            self.handleError(record)

    def put(self, event: LogEvent, fields: dict[str, Any]) -> None:
        if self._waiting.qsize() >= MAX_WAITING_LINES:
            self._drop(1)
            return
        try:
            self._waiting.put(event_line(event, fields, datetime.now(UTC)))
        except Exception:  # as in `emit`
            self._drop(1)

    def flush(self) -> None:
        """Wait until all logged lines are written, for at most FLUSH_SECONDS, so that the process can end."""
        written = threading.Event()
        self._waiting.put(written)
        written.wait(FLUSH_SECONDS)

    def _write_for_ever(self) -> None:
        while True:
            taken = [self._waiting.get()]
            # No other thread takes lines, so those that are counted here are there.
            more = min(self._waiting.qsize(), LINES_A_WRITE - 1)
            taken += [self._waiting.get_nowait() for _ in range(more)]
            lines = [one for one in taken if isinstance(one, bytes)]
            flushes = [one for one in taken if isinstance(one, threading.Event)]
            if len(taken) < LINES_A_WRITE:
                lines += self._report()
            try:
                self._write(b"\n".join([*lines, b""]))
            except OSError:  # a full disk, a pipe whose other end is gone
                self._drop(len(lines))
            for flush in flushes:
                flush.set()
            if len(taken) < LINES_A_WRITE:
                time.sleep(GATHER_SECONDS)

    def _report(self) -> list[bytes]:
        """A log line that counts the lines dropped since the last such line; empty if none were dropped."""
        count = self.dropped - self._reported
        if not count:
            return []
        self._reported += count
        event = LogEvent.LINES_DROPPED
        head = {
            "name": event.logger.name,
            "levelname": logging.getLevelName(event.level),
            "msg": event.message,
        }
        return [self._line(logging.makeLogRecord({**head, "count": count}))]

    def _line(self, record: logging.LogRecord) -> bytes:
        return self.format(record).encode("utf-8", "backslashreplace")

    def _drop(self, count: int) -> None:
        with self._counting:
            self.dropped += count

    def _write(self, lines: bytes) -> None:
        while lines:
            try:
                lines = lines[os.write(self._descriptor, lines) :]
            except BlockingIOError:  # another process that shares the descriptor made it non-blocking
                select.select([], [self._descriptor], [])


def never_wait_for_logs() -> None:
    """Replace each StreamHandler of the root logger by a LogQueue on the same descriptor.

    If it then is the only handler and writes JSON, events go straight into it from now on.
    """
    root = logging.getLogger()
    for index, handler in enumerate(root.handlers):
        if type(handler) is logging.StreamHandler:
            handler.flush()
            queue = LogQueue(handler.stream.fileno())
            queue.setFormatter(handler.formatter)
            root.handlers[index] = queue
    alone = [
        one for one in root.handlers if isinstance(one, LogQueue) and type(one.formatter) is JsonFormatter
    ]
    # A factory of another kind adds members to every line.
    QUEUE_ALONE[:] = alone if logging.getLogRecordFactory() is logging.LogRecord else []


def flush_logs() -> None:
    """Wait until all logged lines are written, for at most FLUSH_SECONDS a handler."""
    for handler in logging.getLogger().handlers:
        handler.flush()


class DroppedLines(Collector):
    """Collects the metric from the log handlers, because they belong to the process, not to one sidecar."""

    def __init__(
        self, family: str, meaning: str, labels: Sequence[str], *, registry: CollectorRegistry
    ) -> None:
        del labels
        self._names = family, meaning
        registry.register(self)

    def collect(self) -> Iterable[CounterMetricFamily]:
        queues = [one for one in logging.getLogger().handlers if isinstance(one, LogQueue)]
        yield CounterMetricFamily(*self._names, value=sum(queue.dropped for queue in queues))

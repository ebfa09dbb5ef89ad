"""Nobody waits for whoever reads the log: a pipe that nobody reads would stop the event loop and the gate.

A thread writes the lines. What it cannot get rid of waits, up to a bound; beyond it lines are dropped and
counted.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Iterable
from queue import Empty, SimpleQueue

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

MAX_WAITING_LINES = 10_000
LINES_A_WRITE = 256
# To wake the thread for each line would cost the event loop more than to make the line.
GATHER_SECONDS = 0.02
FLUSH_SECONDS = 1.0


class LogQueue(logging.Handler):
    """Stands where a StreamHandler stood.

    It writes to the descriptor itself: a thread that hangs in there then holds no lock of a handler or of a
    file, for which the end of the process would wait.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.dropped = 0
        self._told = 0
        self._descriptor = descriptor
        self._lines: SimpleQueue[str | threading.Event] = SimpleQueue()
        threading.Thread(target=self._write_for_ever, name="scopegate-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        if self._lines.qsize() >= MAX_WAITING_LINES:
            self.dropped += 1
            return
        try:
            self._lines.put(self.format(record) + "\n")
        except Exception:  # as in the handlers of logging: what logs must not fail for it
            self.handleError(record)

    def flush(self) -> None:
        """Wait until what was logged is written, but not for ever: this is called at the very end, too."""
        written = threading.Event()
        self._lines.put(written)
        written.wait(FLUSH_SECONDS)

    def _write_for_ever(self) -> None:
        while True:
            taken = [self._lines.get()]
            try:
                while len(taken) < LINES_A_WRITE:
                    taken.append(self._lines.get_nowait())
            except Empty:
                taken += self._confession()
            try:
                lines = "".join(one for one in taken if isinstance(one, str))
                self._write(lines.encode("utf-8", "backslashreplace"))
            except OSError:  # a full disk, a pipe whose other end is gone
                self.dropped += sum(isinstance(one, str) for one in taken)
            for one in taken:
                if isinstance(one, threading.Event):
                    one.set()
            if len(taken) < LINES_A_WRITE:
                time.sleep(GATHER_SECONDS)

    def _confession(self) -> list[str]:
        """What there is to say of lines that are missing, once there is room again."""
        count = self.dropped - self._told
        if not count:
            return []
        self._told += count
        level = {"levelname": "WARNING", "levelno": logging.WARNING}
        said = {"name": "scopegate", "msg": "log lines were dropped", "count": count, **level}
        return [self.format(logging.makeLogRecord(said)) + "\n"]

    def _write(self, lines: bytes) -> None:
        while lines:
            try:
                lines = lines[os.write(self._descriptor, lines) :]
            except BlockingIOError:  # another process that has it, too, made it so
                select.select([], [self._descriptor], [])


def never_wait_for_logs() -> None:
    """From now on a thread writes what the root logger's handlers wrote to streams."""
    root = logging.getLogger()
    for index, handler in enumerate(root.handlers):
        if type(handler) is logging.StreamHandler:
            handler.flush()
            queue = LogQueue(handler.stream.fileno())
            queue.setFormatter(handler.formatter)
            root.handlers[index] = queue


def flush_logs() -> None:
    """Wait, but not for ever, until what was logged is written."""
    for handler in logging.getLogger().handlers:
        handler.flush()


class DroppedLines(Collector):
    """The metric, read where the number is: a log belongs to the process, not to one sidecar in it."""

    def collect(self) -> Iterable[CounterMetricFamily]:
        queues = [one for one in logging.getLogger().handlers if isinstance(one, LogQueue)]
        yield CounterMetricFamily(
            "scopegate_log_lines_dropped",
            "Log lines that were not written, because nobody read them in time.",
            value=sum(queue.dropped for queue in queues),
        )

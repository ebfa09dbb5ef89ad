"""Writes signed checkpoints of the log to a file beside it. They reveal records cut off the end of the log.

A checkpoint covers durable records only, so a power failure never makes an untouched log fail verification.
"""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sidecar.core.checkpoint import Checkpoint
from sidecar.core.instant import iso_time
from sidecar.errors import StoreUnavailable
from sidecar.store._ownership import is_owned
from sidecar.store.batch import Store
from sidecar.telemetry.events import LogEvent
from sidecar.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from sidecar.files.signing import SigningKey  # slow to import, and used only if the log is signed

# A checkpoint is due after this many new records, or this many seconds after the first of them.
RECORDS = 1_000
SECONDS = 10.0
# Every line begins like this. A file that begins otherwise is not a checkpoint file, so it is never cut.
BEGINNING = b'{"count":'
# How long the last checkpoint may take while the sidecar stops.
CLOSE_SECONDS = 2.0
# The bytes read at the beginning and at the end of a file, a few lines, to find the writers it names.
GLANCE_BYTES = 4_096


class Checkpointer:
    """Writes a checkpoint whenever one is due. It never raises and never blocks the store.

    It observes the store and passes every event on to the metrics.
    """

    def __init__(self, key: SigningKey, path: Path, metrics: Metrics) -> None:
        self._key = key
        self._path = path
        self._metrics = metrics
        self._attested = 0
        self._store: Store | None = None
        self._task: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._one_at_a_time = threading.Lock()

    def batch_committed(self, size: int, seconds: float) -> None:
        self._metrics.batch_committed(size, seconds)
        self._news.set()

    def batch_failed(self, size: int) -> None:
        self._metrics.batch_failed(size)

    def start(self, store: Store) -> None:
        """Start with a checkpoint of the records that the open store already holds."""
        self._store = store
        # On a daemon thread, because reading the file may hang.
        threading.Thread(
            target=self._look, args=(store.durable.writer,), name="scopegate-checkpoint-file", daemon=True
        ).start()
        self._news.set()
        self._task = asyncio.create_task(self._run(store), name="scopegate-checkpoints")

    async def close(self) -> bool:
        """Write the last checkpoint. Call it after the last commit and before the store is closed.

        Returns False if the file hangs. Then its thread keeps running until the process ends.
        """
        if self._task is None or self._store is None:
            return True
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        last = asyncio.ensure_future(self._attest(self._store))
        done, _ = await asyncio.wait([last], timeout=CLOSE_SECONDS)
        if not done:
            self._failed(f"nothing was written within {CLOSE_SECONDS:g} s")
            last.cancel()
        return bool(done)

    def _look(self, writer: str) -> None:
        """Warn if the file holds checkpoints of another log, because this log then fails verification."""
        with suppress(OSError):  # the file does not exist yet, or the first write reports the error
            others = writers(self._path) - {writer}
            if others:
                LogEvent.FOREIGN_CHECKPOINTS.log(
                    checkpoint_file=str(self._path), writer=writer, other_writers=sorted(others)
                )

    async def _run(self, store: Store) -> None:
        while True:
            await self._news.wait()
            await self._until_due(store)
            self._news.clear()
            while not await self._attest(store):
                await asyncio.sleep(SECONDS)

    async def _until_due(self, store: Store) -> None:
        """Wait for RECORDS new records, at most SECONDS."""
        due = asyncio.get_running_loop().time() + SECONDS
        with suppress(TimeoutError):
            async with asyncio.timeout_at(due):
                while store.durable.seq - self._attested < RECORDS:
                    self._news.clear()
                    await self._news.wait()

    async def _attest(self, store: Store) -> bool:
        """Write a checkpoint of the durable records; False if that failed."""
        try:
            if store.durable.seq - self._attested < RECORDS:
                # A commit of settlements only is not durable by itself; this check makes it so.
                with suppress(StoreUnavailable):
                    await store.check()
            head = store.durable
            if head.seq > self._attested:
                time = iso_time(store.now())
                await self._write(
                    self._key.checkpoint(writer=head.writer, count=head.seq, head=head.hash, time=time)
                )
        except Exception as exc:
            self._failed(str(exc))
            return False
        return True

    async def _write(self, checkpoint: Checkpoint) -> None:
        writing = asyncio.ensure_future(asyncio.to_thread(self._append, checkpoint.line()))
        while not (await asyncio.wait([writing], timeout=SECONDS))[0]:
            self._failed(f"nothing was written within {SECONDS:g} s")
        writing.result()
        self._attested = checkpoint.count
        self._metrics.checkpoint_seq.set(checkpoint.count)

    def _append(self, line: bytes) -> None:
        with self._one_at_a_time:
            append(self._path, line)

    def _failed(self, cause: str) -> None:
        self._metrics.checkpoint_failures.inc()
        LogEvent.CHECKPOINT_FAILED.log(cause=cause, checkpoint_file=str(self._path))


def writers(path: Path) -> set[str]:
    """The writers named in the first and the last complete line of a file. Raises OSError."""
    _check_is_not_the_database(path)
    with path.open("rb") as file:
        beginning = file.read(GLANCE_BYTES)
        file.seek(max(0, os.fstat(file.fileno()).st_size - GLANCE_BYTES))
        end = file.read(GLANCE_BYTES)
    found = set()
    # The very last line may be torn. Then the line before it is complete.
    for line in (*beginning.splitlines(keepends=True)[:1], *end.splitlines(keepends=True)[-2:]):
        with suppress(ValueError, RecursionError):
            found.add(Checkpoint.parse(line).writer)
    return found


def append(path: Path, line: bytes) -> None:
    """Append one complete line to a file and sync it to the disk. Raises OSError.

    A last line without a line end is the rest of a write that a crash or a full disk cut short. It never
    counted as a checkpoint, so it is removed.
    """
    _check_is_not_the_database(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    number = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _cut_torn_end(number)
        if os.write(number, line) != len(line):
            raise OSError("the disk took only a part of the line; is it full?")
        os.fsync(number)
    finally:
        os.close(number)
    if is_new:
        _sync_folder(path.parent)


def _check_is_not_the_database(path: Path) -> None:
    """Raise OSError for the database itself, because closing it would drop the locks that SQLite holds."""
    if is_owned(path):
        raise OSError("the file is the database itself; give log.checkpoint_file a name of its own")


def _cut_torn_end(number: int) -> None:
    if not BEGINNING.startswith(os.pread(number, len(BEGINNING), 0)):
        raise OSError("the file holds something else than checkpoints")
    end = size = os.fstat(number).st_size
    while end > 0:
        block = os.pread(number, min(end, 4_096), end - min(end, 4_096))
        newline = block.rfind(b"\n")
        if newline >= 0:
            end += newline + 1 - len(block)
            break
        end -= len(block)
    if end < size:
        os.ftruncate(number, end)


def _sync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    finally:
        os.close(number)

"""The checkpointer attests what is safely on disk, in time, line by line, and never gets in anybody's way."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from unittest import mock

import pytest

from sidecar.core.checkpoint import Checkpoint
from sidecar.core.command import Admitted, Issued, Settle
from sidecar.errors import LogTampered
from sidecar.files.signing import SigningKey
from sidecar.ids import new_decision_id
from sidecar.store import checkpoints
from sidecar.store.attestation import read_checkpoints
from sidecar.store.batch import Store
from sidecar.store.checkpoints import Checkpointer, append
from sidecar.store.sqlite import SqliteEngine
from sidecar.store.verify import verify_sqlite
from sidecar.telemetry.metrics import Metrics
from tests.store.conftest import admit, issue
from tests.support import Clock, eventually

KEY = SigningKey.generate()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints after 5 records or a tenth of a second; what a close may take is as long as ever."""
    monkeypatch.setattr(checkpoints, "RECORDS", 5)
    monkeypatch.setattr(checkpoints, "SECONDS", 0.1)


def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time alone makes no checkpoint due."""
    monkeypatch.setattr(checkpoints, "SECONDS", 60.0)


class Attesting:
    """A store with a checkpointer, on disk."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self.database = folder / "log.db"
        self.file = folder / "sub" / "checkpoints.jsonl"
        self.metrics = Metrics()
        self.checkpointer = Checkpointer(KEY, self.file, self.metrics)
        self.store = Store(
            SqliteEngine(self.database), clock=clock, deadline_seconds=5.0, observer=self.checkpointer
        )

    async def record(self, count: int = 1) -> None:
        await asyncio.gather(*(self.store.submit(admit("scope_none")) for _ in range(count)))

    def lines(self) -> list[Checkpoint]:
        """What is attested; that it verifies is a part of every test here."""
        attested = read_checkpoints(self.file, [KEY.public]).attested
        return [one.checkpoint for one in attested]

    def counts(self) -> list[int]:
        return [checkpoint.count for checkpoint in self.lines()]

    def metric(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(name)

    def failures(self) -> float:
        return self.metric("scopegate_checkpoint_failures_total") or 0.0


@asynccontextmanager
async def attesting(folder: Path, clock: Clock, *, holds: bool = True) -> AsyncIterator[Attesting]:
    """Begins like a sidecar and ends like one; then the log has to be as its checkpoints say."""
    running = Attesting(folder, clock)
    await running.store.open()
    running.checkpointer.start(running.store)
    try:
        yield running
    finally:
        await running.store.until_idle()
        closed = await running.checkpointer.close()
        assert await running.store.close()
    if holds:
        assert closed
        verified = verify_sqlite(running.database, attestation=read_checkpoints(running.file, [KEY.public]))
        assert (verified.attested is not None) == (verified.records > 0)
        if verified.attested is not None:
            assert verified.attested.checkpoint.count == verified.records


async def test_a_new_record_is_attested_in_time(tmp_path: Path, clock: Clock) -> None:
    async with attesting(tmp_path, clock) as running:
        await running.record()
        assert not running.file.exists()
        await eventually(lambda: running.counts() == [1])
        await running.record(2)
        await eventually(lambda: running.counts() == [1, 3])
        await eventually(lambda: running.metric("scopegate_checkpoint_seq") == 3)
        await asyncio.sleep(0.3)
        assert running.counts() == [1, 3], "without new records there is nothing to attest"
        head = running.store.durable
        (_, last) = running.lines()
        assert (last.writer, last.count, last.head) == (head.writer, head.seq, head.hash.hex())


async def test_many_records_are_attested_at_once(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient(monkeypatch)
    async with attesting(tmp_path, clock) as running:
        await running.record(4)
        await asyncio.sleep(0.1)
        assert running.counts() == []
        await running.record()
        await eventually(lambda: running.counts() == [5])
        for _ in range(3):
            await running.record(5)
            await asyncio.sleep(0.05)
        await eventually(lambda: running.counts()[-1] == 20)


async def test_what_is_left_is_attested_at_the_end(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient(monkeypatch)
    async with attesting(tmp_path, clock) as running:
        await running.record(3)
        assert running.counts() == []
    assert running.counts() == [3]


async def test_an_empty_log_is_not_attested(tmp_path: Path, clock: Clock) -> None:
    async with attesting(tmp_path, clock) as running:
        await asyncio.sleep(0.2)
    assert not running.file.exists()
    assert running.metric("scopegate_checkpoint_seq") == 0


async def test_what_a_start_finds_unattested_is_attested(tmp_path: Path, clock: Clock) -> None:
    unattested = Attesting(tmp_path, clock)
    await unattested.store.open()
    await unattested.record(2)
    await unattested.store.close()
    async with attesting(tmp_path, clock) as running:
        await eventually(lambda: running.counts() == [2])


async def test_only_what_a_full_commit_covers_is_attested(tmp_path: Path, clock: Clock) -> None:
    async with attesting(tmp_path, clock) as running:
        issued = await running.store.submit(issue())
        assert isinstance(issued, Issued)
        admitted = await running.store.submit(admit(issued.scope.scope_id))
        assert isinstance(admitted, Admitted)
        await eventually(lambda: running.counts()[-1:] == [2])
        await running.store.submit(
            Settle(
                decision_id=new_decision_id(),
                admission_id=admitted.execution.decision_id,
                outcome="answered",
            )
        )
        assert running.store.durable.seq == 2, "a settlement alone is not flushed"
        await eventually(lambda: running.counts()[-1:] == [3])
        assert running.store.durable.seq == 3


async def test_what_cannot_be_made_durable_is_not_attested(tmp_path: Path, clock: Clock) -> None:
    away = tmp_path / "away.db"
    async with attesting(tmp_path, clock) as running:
        issued = await running.store.submit(issue())
        assert isinstance(issued, Issued)
        admitted = await running.store.submit(admit(issued.scope.scope_id))
        assert isinstance(admitted, Admitted)
        await running.store.submit(
            Settle(
                decision_id=new_decision_id(),
                admission_id=admitted.execution.decision_id,
                outcome="answered",
            )
        )
        os.rename(running.database, away)
        await eventually(lambda: running.counts() == [2])
        await asyncio.sleep(0.3)
        assert running.counts() == [2]
        os.rename(away, running.database)


async def test_every_line_is_whole_and_nobody_else_reads_them(tmp_path: Path, clock: Clock) -> None:
    async with attesting(tmp_path, clock) as running:
        for _ in range(20):
            await running.record(5)
    raw = running.file.read_bytes()
    assert raw.endswith(b"\n")
    assert raw == b"".join(checkpoint.line() for checkpoint in running.lines())
    assert running.counts() == sorted(running.counts())
    assert running.file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("torn", [b"{", b'{"count":', b'{"count":2,"head":"ab', b"x" * 10_000])
async def test_a_torn_last_line_is_cut_away(tmp_path: Path, clock: Clock, torn: bytes) -> None:
    async with attesting(tmp_path, clock) as running:
        await running.record()
    with running.file.open("ab") as stream:
        stream.write(torn)
    async with attesting(tmp_path, clock) as running:
        await running.record()
    assert running.counts()[0] == 1
    assert running.counts()[-1] == 2
    assert torn + b"{" not in running.file.read_bytes()


@pytest.mark.parametrize("torn", [b"{", b'{"count":12'])
def test_a_file_that_holds_a_torn_line_only_begins_anew(tmp_path: Path, torn: bytes) -> None:
    (tmp_path / "file").write_bytes(torn)
    append(tmp_path / "file", b'{"count":1}\n')
    assert (tmp_path / "file").read_bytes() == b'{"count":1}\n'


@pytest.mark.parametrize("content", [b"a text without an end", b"SQLite format 3\0", b"{}\n", b"\n"])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(OSError, match="something else than checkpoints"):
        append(tmp_path / "file", b'{"count":1}\n')
    assert (tmp_path / "file").read_bytes() == content


async def test_a_failure_is_counted_and_logged_and_tried_again(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "sub").write_text("a file where a folder should be")
    async with attesting(tmp_path, clock) as running:
        await running.record()
        await eventually(lambda: running.failures() >= 2)
        failed = [record for record in caplog.records if record.name == "scopegate.checkpoints"]
        assert {record.levelno for record in failed} == {logging.ERROR}
        assert failed[0].getMessage() == "a checkpoint could not be written"
        assert vars(failed[0])["checkpoint_file"] == str(running.file)
        await running.record(3)  # the store goes on
        (tmp_path / "sub").unlink()
        await eventually(lambda: running.counts()[-1:] == [4])
        await eventually(lambda: running.metric("scopegate_checkpoint_seq") == 4)


async def test_a_file_that_disappears_is_begun_anew(tmp_path: Path, clock: Clock) -> None:
    async with attesting(tmp_path, clock) as running:
        await running.record()
        await eventually(lambda: running.counts() == [1])
        running.file.unlink()
        await running.record()
        await eventually(lambda: running.counts() == [2])


async def test_a_file_that_hangs_holds_up_neither_the_store_nor_the_end(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "CLOSE_SECONDS", 0.3)
    free = threading.Event()
    entered = threading.Event()

    def hanging(path: Path, line: bytes) -> None:
        entered.set()
        free.wait(10)
        append(path, line)

    with mock.patch.object(checkpoints, "append", hanging):
        running = Attesting(tmp_path, clock)
        await running.store.open()
        running.checkpointer.start(running.store)
        await running.record()
        await eventually(entered.is_set)
        await eventually(lambda: running.failures() >= 1)
        await running.record(20)
        begun = asyncio.get_running_loop().time()
        assert not await running.checkpointer.close()
        assert asyncio.get_running_loop().time() - begun < 1
        assert await running.store.close()
        free.set()
        # What was on its way still comes whole, one line after the other.
        await eventually(lambda: running.file.exists() and running.counts()[-1:] == [21])


# The file of another database ---------------------------------------------------------------------------


def looked() -> None:
    """Returns once whoever looks at the file has done so."""
    for thread in threading.enumerate():
        if thread.name == "scopegate-checkpoint-file":
            thread.join(10)
            assert not thread.is_alive()


def warned(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    looked()
    return [record for record in caplog.records if record.levelno == logging.WARNING]


def put_away(running: Attesting) -> None:
    for suffix in ("", "-wal", "-shm"):
        file = Path(f"{running.database}{suffix}")
        if file.exists():
            file.rename(f"{file}.away")


def with_torn_end(whole: bytes) -> bytes:
    return whole + whole[:-20]


@pytest.mark.parametrize("end", [bytes, with_torn_end, lambda whole: whole + b"x" * 10_000])
async def test_a_new_database_under_an_old_file_is_warned_of_at_every_start(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, end: Callable[[bytes], bytes]
) -> None:
    async with attesting(tmp_path, clock) as running:
        await running.record()
    assert warned(caplog) == []
    (old,) = running.lines()
    put_away(running)
    running.file.write_bytes(end(running.file.read_bytes()))
    for start in (1, 2):  # at the second one the last line is the new database's own
        caplog.clear()
        async with attesting(tmp_path, clock, holds=False) as running:
            (warning,) = warned(caplog)
            assert "give a new log.checkpoint_file, or put the old database back" in warning.getMessage()
            told = vars(warning)
            assert told["checkpoint_file"] == str(running.file)
            assert (told["writer"], told["other_writers"]) == (running.store.durable.writer, [old.writer])
            await running.record()
        assert len(running.lines()) == start + 1
    with pytest.raises(LogTampered, match="another log was put in its place"):
        verify_sqlite(running.database, attestation=read_checkpoints(running.file, [KEY.public]))


async def test_an_old_database_under_a_newer_file_is_warned_of(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    other = KEY.checkpoint(writer="another", count=3, head=bytes(32), time="then")
    async with attesting(tmp_path, clock) as running:
        await running.record()
    with running.file.open("ab") as stream:
        stream.write(other.line())
    async with attesting(tmp_path, clock, holds=False):
        (warning,) = warned(caplog)
    assert vars(warning)["other_writers"] == ["another"]


@pytest.mark.parametrize("end", [b"", b"{", b'{"count":2,"head":"ab'])
async def test_a_database_under_its_own_file_is_not_warned_of(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, end: bytes
) -> None:
    for _ in range(3):
        async with attesting(tmp_path, clock) as running:
            assert warned(caplog) == []
            await running.record(20)
        with running.file.open("ab") as stream:
            stream.write(end)
    assert len(running.counts()) > 2


@pytest.mark.parametrize("content", [b"", b"\n", b"{", b"{}\n", b"[" * 100_000, bytes(range(256)) * 100])
async def test_a_file_of_something_else_is_looked_at_without_harm(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    running = Attesting(tmp_path, clock)
    running.file.parent.mkdir()
    running.file.write_bytes(content)
    async with attesting(tmp_path, clock, holds=False):
        assert warned(caplog) == []
    assert running.file.read_bytes() == content


async def test_a_file_that_hangs_when_it_is_looked_at_holds_nothing_up(tmp_path: Path, clock: Clock) -> None:
    running = Attesting(tmp_path, clock)
    running.file.parent.mkdir()
    os.mkfifo(running.file)

    def let_go() -> None:
        os.close(os.open(running.file, os.O_RDWR))

    last_resort = threading.Timer(10, let_go)
    last_resort.start()
    begun = asyncio.get_running_loop().time()
    async with attesting(tmp_path, clock, holds=False):
        pass
    assert asyncio.get_running_loop().time() - begun < 5
    assert "scopegate-checkpoint-file" in [thread.name for thread in threading.enumerate()]
    last_resort.cancel()
    let_go()
    looked()


async def test_closing_what_never_started_is_nothing(tmp_path: Path) -> None:
    assert await Checkpointer(KEY, tmp_path / "file", Metrics()).close()
    assert not (tmp_path / "file").exists()


async def test_metrics_hear_of_every_batch(tmp_path: Path, clock: Clock) -> None:
    async with attesting(tmp_path, clock) as running:
        await running.record(3)
        assert (running.metric("scopegate_store_batch_size_sum") or 0) == 3
        running.checkpointer.batch_failed(1)
        assert running.metric("scopegate_store_failures_total") == 1

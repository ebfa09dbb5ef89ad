"""Checkpoints show what the chain alone cannot: a tail that was cut off, and a log that was written anew."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from sidecar.core.checkpoint import Checkpoint
from sidecar.core.instant import iso_time
from sidecar.errors import LogTampered, StoreUnavailable
from sidecar.files.signing import PublicKey, SigningKey
from sidecar.store.attestation import NONE, Attested, read_checkpoints
from sidecar.store.verify import Verified, verify_sqlite
from tests.store.conftest import OpenStore, admit

KEY = SigningKey.generate()
OTHER = SigningKey.generate()


def at(count: int) -> str:
    """The time at which a count is attested here."""
    return iso_time(count * 1_000_000)


class Evidence:
    """A closed log of ten records, checkpoints of it, and whatever is done to both."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log.db"
        self.file = folder / "checkpoints.jsonl"

    def head(self, seq: int) -> bytes:
        with closing(sqlite3.connect(self.log)) as connection:
            found = connection.execute("SELECT hash FROM decisions WHERE seq = ?", (seq,)).fetchone()
        return bytes(found[0])

    def signed(self, count: int, key: SigningKey = KEY) -> Checkpoint:
        writer = verify_sqlite(self.log).writer
        return key.checkpoint(writer=writer, count=count, head=self.head(count), time=at(count))

    def attest(self, *counts: int, key: SigningKey = KEY) -> None:
        with self.file.open("ab") as stream:
            stream.writelines(self.signed(count, key).line() for count in counts)

    def tamper(self, *statements: str) -> None:
        """Write past the triggers."""
        with closing(sqlite3.connect(self.log, isolation_level=None)) as connection:
            triggers = connection.execute(
                "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"
            ).fetchall()
            for name, _ in triggers:
                connection.execute(f"DROP TRIGGER {name}")
            for statement in statements:
                connection.execute(statement)
            for _, sql in triggers:
                connection.execute(sql)

    def write_anew(self, altered: int) -> None:
        """Alter one record and link all that follow, so that the chain by itself is perfect."""
        statements = []
        with closing(sqlite3.connect(self.log)) as connection:
            previous = bytes(32)
            for seq, raw in connection.execute("SELECT seq, envelope FROM decisions ORDER BY seq"):
                envelope = raw.replace(b'"anonymous"', b'"somebody"') if seq == altered else raw
                assert (envelope != raw) == (seq == altered)
                previous = hashlib.sha256(previous + envelope).digest()
                statements.append(
                    f"UPDATE decisions SET envelope = x'{envelope.hex()}', hash = x'{previous.hex()}' "
                    f"WHERE seq = {seq}"
                )
        self.tamper(*statements)

    def verify(self, keys: Sequence[PublicKey] = (KEY.public,)) -> Verified:
        return verify_sqlite(self.log, attestation=read_checkpoints(self.file, keys))

    def verdict(self, keys: Sequence[PublicKey] = (KEY.public,)) -> str:
        with pytest.raises(LogTampered) as caught:
            self.verify(keys)
        return str(caught.value)


@pytest.fixture
async def evidence(open_store: OpenStore, tmp_path: Path) -> Evidence:
    found = Evidence(tmp_path)
    store = await open_store(found.log)
    for number in range(10):
        await store.submit(admit(f"scope_{number}"))
    await store.close()
    return found


def test_a_true_log_is_attested_up_to_its_last_checkpoint(evidence: Evidence) -> None:
    evidence.attest(3, 7, 7)
    assert evidence.verify().attested == Attested(3, evidence.signed(7))
    evidence.attest(10)
    assert evidence.verify().attested == Attested(4, evidence.signed(10))


def test_checkpoints_need_not_stand_in_their_order(evidence: Evidence) -> None:
    evidence.attest(10, 1, 5)
    assert evidence.verify().attested == Attested(1, evidence.signed(10))


@pytest.mark.parametrize("left", [0, 1, 6, 9])
def test_a_tail_that_was_cut_off_is_named(evidence: Evidence, left: int) -> None:
    evidence.attest(4, 10)
    evidence.tamper(f"DELETE FROM decisions WHERE seq > {left}")
    assert evidence.verdict() == (
        f"records {left + 1} to 10 are missing from the end: the checkpoint of {at(10)} (line 2) attests 10"
    )


def test_a_tail_that_nobody_attested_cannot_be_missed(evidence: Evidence) -> None:
    evidence.attest(8)
    evidence.tamper("DELETE FROM decisions WHERE seq > 8")
    assert evidence.verify().records == 8


def test_a_log_that_was_written_anew_is_named_with_what_still_holds(evidence: Evidence) -> None:
    evidence.attest(2, 4, 6, 8)
    evidence.write_anew(5)
    assert verify_sqlite(evidence.log).records == 10, "the chain by itself is perfect"
    assert evidence.verdict() == (
        "the log was rewritten somewhere up to record 6: its chain is not the one that the checkpoint of "
        f"{at(6)} (line 3) attests; records 1 to 4 are as the checkpoint of {at(4)} (line 2) says"
    )


def test_a_log_that_was_written_anew_from_its_start_agrees_with_nothing(evidence: Evidence) -> None:
    evidence.attest(3, 10)
    evidence.write_anew(1)
    told = evidence.verdict()
    assert "somewhere up to record 3" in told
    assert told.endswith("none are attested")


def test_a_log_that_was_written_anew_and_cut_is_found(evidence: Evidence) -> None:
    evidence.attest(3, 10)
    evidence.write_anew(5)
    evidence.tamper("DELETE FROM decisions WHERE seq > 9")
    assert evidence.verdict().startswith("records 10 to 10 are missing from the end")


def test_an_altered_record_is_named_before_anything_that_follows(evidence: Evidence) -> None:
    evidence.attest(3, 6, 10)
    evidence.tamper("UPDATE decisions SET action = 'x' WHERE seq = 5", "DELETE FROM decisions WHERE seq > 8")
    assert evidence.verdict().startswith("record 5 was altered")


@pytest.mark.parametrize("gone", [3, 5, 6, 7])
def test_a_missing_record_is_named_wherever_checkpoints_stand(evidence: Evidence, gone: int) -> None:
    evidence.attest(1, 2, 5, 6)
    evidence.tamper(f"DELETE FROM decisions WHERE seq = {gone}")
    assert evidence.verdict() == f"record {gone} is missing: the next one in the log is {gone + 1}"


async def test_another_log_in_its_place_is_found(
    evidence: Evidence, open_store: OpenStore, tmp_path: Path
) -> None:
    evidence.attest(5)
    store = await open_store(tmp_path / "other.db")
    for number in range(20):
        await store.submit(admit(f"scope_{number}"))
    await store.close()
    evidence.log = tmp_path / "other.db"
    assert "another log was put in its place" in evidence.verdict()


@pytest.mark.parametrize("line", [1, 2, 3])
@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (b'"count":', b'"count":1', "its signature does not fit"),
        (b"1970", b"1971", "its signature does not fit"),
        (b'{"count"', b'{"cuont"', "it is no checkpoint"),
        (b"{", b"", "it is no checkpoint"),
        (b'"}', b'" }', "it is no checkpoint"),
    ],
)
def test_an_altered_line_is_named(evidence: Evidence, line: int, old: bytes, new: bytes, why: str) -> None:
    evidence.attest(2, 5, 8)
    lines = evidence.file.read_bytes().splitlines(keepends=True)
    lines[line - 1] = lines[line - 1].replace(old, new, 1)
    evidence.file.write_bytes(b"".join(lines))
    assert evidence.verdict() == f"line {line} of {evidence.file} was altered: {why}"


def test_a_torn_line_in_the_middle_is_tampering(evidence: Evidence) -> None:
    evidence.attest(2, 5)
    first, second = evidence.file.read_bytes().splitlines(keepends=True)
    evidence.file.write_bytes(first[:-20] + second)
    assert evidence.verdict().startswith("line 1 ")
    evidence.file.write_bytes(b"\n" + first)
    assert evidence.verdict().startswith("line 1 ")


def test_a_torn_last_line_is_no_tampering(evidence: Evidence) -> None:
    evidence.attest(2, 5)
    raw = evidence.file.read_bytes()
    torn = [Attested(1, evidence.signed(2))]
    for cut in range(1, len(evidence.signed(5).line())):
        evidence.file.write_bytes(raw[:-cut])
        assert read_checkpoints(evidence.file, [KEY.public]).attested == torn
    assert evidence.verify().attested == torn[0]


def test_lines_of_an_unknown_key_are_told_and_not_counted(evidence: Evidence) -> None:
    evidence.attest(2)
    evidence.attest(10, 10, key=OTHER)
    evidence.tamper("DELETE FROM decisions WHERE seq > 5")
    attestation = read_checkpoints(evidence.file, [KEY.public])
    assert attestation.unknown == {OTHER.public.id: 2}
    assert evidence.verify().attested == Attested(1, evidence.signed(2))
    assert evidence.verdict([KEY.public, OTHER.public]).startswith("records 6 to 10 are missing")


def test_a_line_that_poses_as_one_of_a_known_key_is_found(evidence: Evidence) -> None:
    evidence.attest(2, key=OTHER)
    raw = evidence.file.read_bytes()
    evidence.file.write_bytes(raw.replace(OTHER.public.id.encode(), KEY.public.id.encode()))
    assert evidence.verdict() == f"line 1 of {evidence.file} was altered: its signature does not fit"


def test_no_file_and_an_empty_file_attest_nothing(evidence: Evidence) -> None:
    assert read_checkpoints(evidence.file, [KEY.public]) == NONE
    evidence.file.touch()
    assert evidence.verify().attested is None


def test_a_file_that_cannot_be_read_is_no_tampering(evidence: Evidence) -> None:
    evidence.file.mkdir()
    with pytest.raises(StoreUnavailable, match="cannot read the checkpoints"):
        evidence.verify()

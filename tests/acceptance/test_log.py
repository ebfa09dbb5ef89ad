"""The decision log as whoever looks after it meets it: keys, checkpoints, masks, verifying and exporting."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.conftest import (
    ASK_SECONDS,
    EXECUTE,
    PROJECT,
    Backend,
    Program,
    ask,
    ask_json,
    execution,
    issue_many,
    issue_scope,
    scopegate,
    write_configuration,
)

SECRET = "hunter2-4111111111111111"


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend() as running:
        yield running


def configured(folder: Path, backend: Backend, **log: Any) -> Path:
    """A configuration that signs, with a key that the program itself made."""
    folder.mkdir(exist_ok=True)
    made = scopegate("log", "keygen", folder / "log.key")
    assert made.returncode == 0, made
    signs = {"signing_key_file": "log.key", "checkpoint_file": "checkpoints/log.jsonl"}
    return write_configuration(folder, backend.address, log={**signs, **log})


def execute(sidecar: Program, scope_id: str, **parameters: Any) -> str:
    body = {**execution(scope_id), "parameters": parameters}
    answer = ask_json(sidecar.data, "POST", EXECUTE, body)
    assert answer.status == 200, answer
    return answer.headers("scopegate-decision-id")[0]


def attested(config: Path, *more: str | Path) -> int:
    """How many records verify finds attested; all else has to be well."""
    ended = scopegate("log", "verify", "--config", config, *more)
    assert ended.returncode == 0, ended
    found = re.search(
        r"^Attested up to record ([0-9]+), by key [0-9a-f]{16} at 20", ended.stdout, re.MULTILINE
    )
    assert found is not None, ended.stdout
    return int(found[1])


def cut(store: Path, behind: int) -> None:
    with closing(sqlite3.connect(store)) as connection, connection:
        connection.execute("DROP TRIGGER decisions_are_never_deleted")
        connection.execute("DELETE FROM decisions WHERE seq > ?", (behind,))


@pytest.mark.slow
def test_a_signed_log_is_attested_while_it_runs_after_a_kill_and_to_its_very_end(
    tmp_path: Path, backend: Backend
) -> None:
    config = configured(tmp_path, backend)
    with Program(config) as sidecar:
        issue_many(sidecar.data, 1_050)
        file = tmp_path / "checkpoints" / "log.jsonl"

        def checkpoint() -> bool:
            whole = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
            return any(json.loads(line)["count"] >= 1_000 for line in whole)

        sidecar.until("writes a checkpoint", checkpoint)
        assert attested(config) >= 1_000
        metrics = ask(sidecar.ops, "GET", "/metrics").body.decode()
        assert re.search(r"^scopegate_checkpoint_seq 1\d\d\d\.0$", metrics, re.MULTILINE)
        assert "scopegate_checkpoint_failures_total 0.0" in metrics

        sidecar.kill()
        assert attested(config) >= 1_000

        sidecar.start()
        execute(sidecar, issue_scope(sidecar.data))
        assert sidecar.stop() == 0
    ended = scopegate("log", "verify", "--config", config)
    assert ended.stdout.startswith("ok: 1053 records")
    assert "Attested up to record 1053," in ended.stdout
    assert "not attested" not in ended.stdout


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sidecar that has stopped, with nine records in its log, all of them attested."""
    folder = tmp_path_factory.mktemp("recorded")
    with Backend() as backend, Program(configured(folder, backend)) as sidecar:
        for _ in range(3):
            execute(sidecar, issue_scope(sidecar.data))
        assert sidecar.stop() == 0
    return folder


@pytest.fixture
def folder(recorded: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(recorded, tmp_path / "copy"))


def test_a_cut_tail_exits_4_and_is_named(folder: Path) -> None:
    assert attested(folder / "scopegate.yaml") == 9
    cut(folder / "var" / "scopegate.db", 6)
    ended = scopegate("log", "verify", "--config", folder / "scopegate.yaml")
    assert (ended.returncode, ended.stdout) == (4, "")
    assert "TAMPERED: records 7 to 9 are missing from the end: the checkpoint of 20" in ended.stderr


def test_a_cut_tail_shows_although_the_sidecar_went_on(folder: Path) -> None:
    cut(folder / "var" / "scopegate.db", 6)
    with Program(folder / "scopegate.yaml") as sidecar:
        issue_many(sidecar.data, 10)
        assert sidecar.stop() == 0
    ended = scopegate("log", "verify", "--config", folder / "scopegate.yaml")
    assert ended.returncode == 4, ended
    assert "rewritten somewhere up to record 9" in ended.stderr


def test_a_checkpoint_that_was_altered_exits_4(folder: Path) -> None:
    file = folder / "checkpoints" / "log.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"count":9', b'"count":8'))
    ended = scopegate("log", "verify", "--config", folder / "scopegate.yaml")
    assert ended.returncode == 4, ended
    assert f"line 1 of {file} was altered: its signature does not fit" in ended.stderr


def test_the_public_key_is_enough_to_verify(folder: Path) -> None:
    config = folder / "scopegate.yaml"
    (folder / "log.key").unlink()
    assert attested(config, "--public-key", folder / "log.key.pub") == 9
    ended = scopegate("log", "verify", "--config", config)
    assert ended.returncode == 2, ended
    assert "give --public-key FILE" in ended.stderr
    assert scopegate("run", "--config", config).returncode == 2


def test_another_public_key_attests_nothing_and_says_so(folder: Path, tmp_path: Path) -> None:
    assert scopegate("log", "keygen", tmp_path / "other").returncode == 0
    config = folder / "scopegate.yaml"
    ended = scopegate("log", "verify", "--config", config, "--public-key", tmp_path / "other.pub")
    assert ended.returncode == 1, ended
    assert "The tail is not attested: no checkpoint in" in ended.stdout
    assert re.search(r"not verified whole: 1 checkpoints are of the key [0-9a-f]{16}", ended.stderr)
    both = ("--public-key", tmp_path / "other.pub", "--public-key", folder / "log.key.pub")
    assert attested(config, *both) == 9


def test_a_torn_checkpoint_is_no_tampering_and_is_cut_at_the_next_start(folder: Path) -> None:
    config, file = folder / "scopegate.yaml", folder / "checkpoints" / "log.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:100])
    assert attested(config) == 9
    with Program(config) as sidecar:
        issue_scope(sidecar.data)
        assert sidecar.stop() == 0
    assert file.read_bytes().startswith(whole + b'{"count":')
    assert attested(config) == 10


def test_keygen_never_overwrites_and_names_what_to_configure(tmp_path: Path) -> None:
    made = scopegate("log", "keygen", tmp_path / "k")
    assert made.returncode == 0, made
    assert f"signing_key_file: {tmp_path}/k" in made.stdout
    assert (tmp_path / "k").stat().st_mode & 0o777 == 0o600
    kept = (tmp_path / "k").read_bytes(), (tmp_path / "k.pub").read_bytes()
    assert b"PRIVATE" not in kept[1]
    assert kept[0].decode().splitlines()[1] not in made.stdout + made.stderr
    again = scopegate("log", "keygen", tmp_path / "k")
    assert (again.returncode, again.stdout) == (1, "")
    assert "File exists" in again.stderr
    (tmp_path / "k").rename(tmp_path / "moved")
    again = scopegate("log", "keygen", tmp_path / "k")
    assert again.returncode == 1
    assert not (tmp_path / "k").exists(), "half a pair is of no use"
    assert ((tmp_path / "moved").read_bytes(), (tmp_path / "k.pub").read_bytes()) == kept
    assert scopegate("log", "keygen", tmp_path / "none" / "k").returncode == 1


# Masking -----------------------------------------------------------------------------------------------


def everything_written(folder: Path) -> bytes:
    """Every byte of the store, the checkpoints and the log of the program."""
    files = [*(folder / "var").iterdir(), *(folder / "checkpoints").glob("*"), folder / "sidecar.log"]
    return b"".join(file.read_bytes() for file in files)


def test_a_masked_secret_is_nowhere_and_the_backend_gets_it_all_the_same(
    tmp_path: Path, backend: Backend
) -> None:
    (tmp_path / "mask.key").write_bytes(b"0123456789abcdef0123456789abcdef\n")
    (tmp_path / "mask.key").chmod(0o600)
    pointers = ["/decision_inputs/parameters/card", "/decision_inputs/parameters/customers/0/name"]
    config = configured(tmp_path, backend, mask=pointers, mask_key_file="mask.key")
    with Program(config) as sidecar:
        scope = issue_scope(sidecar.data, attempts=5)
        parameters: dict[str, Any] = {"card": SECRET, "customers": [{"name": SECRET, "id": 7}], "n": 1}
        masked = []
        for more in ({}, {}, {"card": {"number": SECRET}}):
            decision_id = execute(sidecar, scope, **{**parameters, **more})
            shown = ask(sidecar.admin, "GET", f"/api/v1/decisions/{decision_id}").json()
            masked.append(shown["decision_inputs"]["parameters"])
        refused = ask_json(sidecar.data, "POST", EXECUTE, {**execution("scope_x"), "parameters": parameters})
        assert refused.status == 404
        assert SECRET.encode() not in everything_written(tmp_path)
        sidecar.kill()
        assert SECRET.encode() not in everything_written(tmp_path)
        sidecar.start()
        assert sidecar.stop() == 0
    assert SECRET.encode() not in everything_written(tmp_path)
    assert b"0123456789abcdef0123456789abcdef" not in everything_written(tmp_path)
    first, again, other = masked
    assert re.fullmatch(r"\[masked:[0-9a-f]{16}\]", first["card"])
    assert first == again == {"card": first["card"], "customers": [{"name": first["card"], "id": 7}], "n": 1}
    assert other["card"] != first["card"]
    exported = scopegate("log", "export", "--config", config)
    assert SECRET not in exported.stdout
    assert exported.stdout.count(first["card"]) >= 6
    assert attested(config) == len(exported.stdout.splitlines())


# Exporting ---------------------------------------------------------------------------------------------


def test_an_export_is_the_whole_chain_beside_a_running_sidecar(folder: Path) -> None:
    config = folder / "scopegate.yaml"
    with Program(config) as sidecar:
        issue_scope(sidecar.data)
        ended = scopegate("log", "export", "--config", config)
        assert (ended.returncode, ended.stderr) == (0, "")
        rest = scopegate("log", "export", "--config", config, "--after", "8")
    previous = bytes(32)
    for seq, line in enumerate(ended.stdout.splitlines(), start=1):
        told = json.loads(line)
        raw = line.split('"envelope":', 1)[1][:-1].encode()
        assert (told["seq"], told["previous_hash"]) == (seq, previous.hex())
        previous = hashlib.sha256(previous + raw).digest()
        assert told["hash"] == previous.hex()
    assert rest.stdout.splitlines() == ended.stdout.splitlines()[8:]
    assert len(rest.stdout.splitlines()) == 2


def test_an_export_takes_its_name_once_it_is_whole(folder: Path, tmp_path: Path) -> None:
    config, output = folder / "scopegate.yaml", tmp_path / "log.jsonl"
    output.write_text("old")
    ended = scopegate("log", "export", "--config", config, "--output", output)
    assert (ended.returncode, ended.stdout) == (0, "")
    assert output.read_text() == scopegate("log", "export", "--config", config).stdout
    assert output.stat().st_mode & 0o777 == 0o600
    with (folder / "var" / "scopegate.db").open("r+b") as database:
        database.truncate(8_192)
    spoiled = scopegate("log", "export", "--config", config, "--output", output)
    assert spoiled.returncode == 4, spoiled
    assert output.read_text().count("\n") == 9, "what was there before stays"
    assert [file for file in tmp_path.iterdir() if file.name.startswith(".log.jsonl")] == []
    for wrong in (tmp_path / "none" / "log.jsonl", Path("/dev/null")):
        assert scopegate("log", "export", "--config", config, "--output", wrong).returncode == 1


def test_whoever_stops_reading_an_export_ends_it_well(folder: Path) -> None:
    store = folder / "var" / "scopegate.db"
    with Program(folder / "scopegate.yaml") as sidecar:
        issue_many(sidecar.data, 200)  # more than a pipe holds
        assert sidecar.stop() == 0
    assert store.stat().st_size > 100_000
    with subprocess.Popen(
        [sys.executable, "-m", "sidecar", "log", "export", "--config", str(folder / "scopegate.yaml")],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert (process.wait(ASK_SECONDS), process.stderr.read()) == (0, b"")


def test_an_export_without_a_store_says_so(tmp_path: Path, backend: Backend) -> None:
    config = write_configuration(tmp_path, backend.address)
    ended = scopegate("log", "export", "--config", config)
    assert ended.returncode == 1, ended
    assert "cannot export: there is no database" in ended.stderr

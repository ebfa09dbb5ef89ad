"""Backing up and restoring as whoever looks after it does: under load, into another folder, and tampered."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.conftest import (
    EXECUTE,
    PROJECT,
    STOP_SECONDS,
    Backend,
    Program,
    ask,
    ask_json,
    execution,
    executions,
    issue_scope,
    scope_of,
    scopegate,
    write_configuration,
)

pytestmark = pytest.mark.slow

STREAMS = 3


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend() as running:
        yield running


def configured(folder: Path, backend: Backend, **sections: Any) -> Path:
    """A configuration that signs, so that the backup is held against checkpoints."""
    folder.mkdir(exist_ok=True)
    assert scopegate("log", "keygen", folder / "log.key").returncode == 0
    signs = {"signing_key_file": "log.key", "checkpoint_file": "checkpoints.jsonl"}
    return write_configuration(folder, backend.address, log=signs, **sections)


@contextmanager
def admissions(sidecar: Program) -> Iterator[list[int]]:
    """Executions that go on and on; gives what each stream has had answered."""
    counts = [0] * STREAMS
    failures: list[object] = []
    done = threading.Event()

    def go_on(stream: int) -> None:
        try:
            while not done.is_set():
                scope = issue_scope(sidecar.data)
                answer = ask_json(sidecar.data, "POST", EXECUTE, execution(scope))
                assert answer.status == 200, answer
                counts[stream] += 1
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=go_on, args=(stream,)) for stream in range(STREAMS)]
    for thread in threads:
        thread.start()
    try:
        yield counts
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert failures == []


def records(database: Path) -> list[tuple[int, bytes, bytes]]:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return connection.execute("SELECT seq, envelope, hash FROM decisions ORDER BY seq").fetchall()


def says(database: Path) -> int:
    """The bytes that a database has by its own account."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        (count,) = connection.execute("PRAGMA page_count").fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    return int(count * size)


def backed_up(config: Path, target: Path, *more: str) -> dict[str, Any]:
    ended = scopegate("store", "backup", target, "--config", config, "--json", *more)
    assert (ended.returncode, ended.stderr) == (0, ""), ended
    told: dict[str, Any] = json.loads(ended.stdout)
    return told


def restored(folder: Path, backup: Path, backend: Backend) -> Path:
    """The configuration of a sidecar in another folder that has the backup for its store."""
    config = configured(folder, backend)
    (folder / "var").mkdir()
    shutil.copyfile(backup, folder / "var" / "scopegate.db")
    return config


def status_of(sidecar: Program) -> dict[str, Any]:
    told: dict[str, Any] = ask(sidecar.admin, "GET", "/api/v1/status").json()["store"]
    return told


def metric(sidecar: Program, name: str) -> float:
    page = ask(sidecar.ops, "GET", "/metrics").body.decode()
    found = re.search(rf"^{name} (\S+)$", page, re.MULTILINE)
    assert found is not None, name
    return float(found[1])


def test_a_backup_under_load_restored_in_another_folder_verifies_and_its_sizes_agree(
    tmp_path: Path, backend: Backend
) -> None:
    config, backup = configured(tmp_path / "one", backend), tmp_path / "backup.db"
    with Program(config) as sidecar:
        with admissions(sidecar) as counts:
            sidecar.until("is under load", lambda: sum(counts) > 50)
            before = len(records(sidecar.store))
            begun = list(counts)
            told = backed_up(config, backup)
            after = len(records(sidecar.store))
            ended = list(counts)
        assert all(now > then for then, now in zip(begun, ended, strict=True)), "nothing went on meanwhile"
        assert before <= told["records"] <= after
        assert sidecar.stop() == 0
    kept = records(backup)
    assert len(kept) == told["records"]
    assert kept == records(sidecar.store)[: len(kept)]
    assert kept[-1][2].hex() == told["head"]
    assert told["file"] == str(backup)
    assert told["bytes"] == backup.stat().st_size == says(backup)

    other = restored(tmp_path / "two", backup, backend)
    verified = scopegate("log", "verify", "--config", other)
    assert verified.returncode == 0, verified
    assert verified.stdout.startswith(f"ok: {told['records']} records of writer ")
    assert f"head {told['head']}" in verified.stdout.splitlines()[0]

    with Program(other) as again:
        assert status_of(again)["size"] == told["bytes"]
        open_ends = executions(again.admin, "in_flight") + executions(again.admin, "unknown")
        settled = len(executions(again.admin, "unknown"))
        assert len(open_ends) == settled <= STREAMS, "what was in flight is unknown"
        scope = issue_scope(again.data)
        assert ask_json(again.data, "POST", EXECUTE, execution(scope)).status == 200
        assert again.stop() == 0
    assert scopegate("log", "verify", "--config", other).stdout.startswith(
        f"ok: {told['records'] + settled + 3} records"
    )
    assert records(again.store)[: len(kept)] == kept


def test_what_was_spent_and_revoked_after_the_backup_is_there_again_until_it_is_revoked_as_the_readme_says(
    tmp_path: Path, backend: Backend
) -> None:
    config, backup = configured(tmp_path / "one", backend), tmp_path / "backup.db"
    with Program(config) as sidecar:
        spent, revoked = issue_scope(sidecar.data), issue_scope(sidecar.data)
        backed_up(config, backup)
        assert ask_json(sidecar.data, "POST", EXECUTE, execution(spent)).status == 200
        assert ask(sidecar.data, "DELETE", f"/api/v1/recovery/scopes/{revoked}").status == 200
        for scope in (spent, revoked):
            assert ask_json(sidecar.data, "POST", EXECUTE, execution(scope)).status == 400
        assert sidecar.stop() == 0
    other = restored(tmp_path / "two", backup, backend)
    with Program(other) as again:
        for scope in (spent, revoked):
            assert scope_of(again.data, scope)["status"] == "active"
        ended = scopegate("scopes", "revoke", "--all", "--yes", *at(again))
        assert ended.returncode == 0, ended
        for scope in (spent, revoked):
            refused = ask_json(again.data, "POST", EXECUTE, execution(scope))
            assert (refused.status, refused.json()["error"]) == (400, "scope_revoked")


def test_an_attempt_in_flight_at_the_backup_is_not_spent_twice_whatever_is_reconciled_after_the_restore(
    tmp_path: Path, backend: Backend
) -> None:
    """Its scope is exhausted in the copy, and would be active again once that execution is `not_executed`."""
    config = configured(tmp_path / "one", backend, upstream={"response_timeout_seconds": 4})
    backup = tmp_path / "backup.db"
    with Program(config) as sidecar:
        scope = issue_scope(sidecar.data)
        answers: list[int] = []
        body = execution(scope)
        hanging = threading.Thread(
            target=lambda: answers.append(ask_json(sidecar.data, "POST", EXECUTE, body).status)
        )
        backend.go_on.clear()
        try:
            hanging.start()
            sidecar.until("is in flight", lambda: backend.seen)
            backed_up(config, backup)
            assert answers == [], "it ended before the backup was made"
            hanging.join()
        finally:
            backend.go_on.set()
        assert answers == [504]
        reconciled_as_not_executed(sidecar)
        assert ask_json(sidecar.data, "POST", EXECUTE, body).status == 200
        assert sidecar.stop() == 0
    assert len(backend.seen) == 2

    other = restored(tmp_path / "two", backup, backend)
    with Program(other) as unreachable:
        assert scope_of(unreachable.data, scope)["status"] == "exhausted"
        revoked = scopegate("scopes", "revoke", "--all", "--yes", *at(unreachable))
        assert revoked.returncode == 0, revoked
        assert unreachable.stop() == 0
    with Program(other) as again:
        reconciled_as_not_executed(again)
        refused = ask_json(again.data, "POST", EXECUTE, body)
        assert (refused.status, refused.json()["error"]) == (400, "scope_revoked")
        assert again.stop() == 0
    assert len(backend.seen) == 2
    verified = scopegate("log", "verify", "--config", other)
    assert verified.returncode == 0, verified


def reconciled_as_not_executed(sidecar: Program) -> None:
    """The one execution of which nobody knows how it ended."""
    (unknown,) = executions(sidecar.admin, "unknown")
    outcome = ("--outcome", "not_executed", "--reason", "The backend never began it")
    ended = scopegate("executions", "reconcile", unknown["decision_id"], *outcome, *at(sidecar))
    assert ended.returncode == 0, ended


def at(sidecar: Program) -> list[str]:
    """How commands find it: by its configuration, and where it listens instead of what stands there."""
    listen = {"data": sidecar.data, "admin": sidecar.admin}
    set_ = [f"--set={name}.listen={host}:{port}" for name, (host, port) in listen.items()]
    return [f"--config={sidecar.config}", *set_]


def test_under_the_old_checkpoint_file_a_restored_backup_is_missing_what_came_after(
    tmp_path: Path, backend: Backend
) -> None:
    config, backup = configured(tmp_path / "one", backend), tmp_path / "backup.db"
    with Program(config) as sidecar:
        issue_scope(sidecar.data)
        backed_up(config, backup)
        issue_scope(sidecar.data)
        assert sidecar.stop() == 0
    for file in (tmp_path / "one" / "var").iterdir():
        file.unlink()
    shutil.copyfile(backup, sidecar.store)
    ended = scopegate("log", "verify", "--config", config)
    assert ended.returncode == 4, ended
    assert "records 2 to 2 are missing from the end" in ended.stderr
    with Program(config) as sidecar:
        issue_scope(sidecar.data)
        issue_scope(sidecar.data)
        assert sidecar.stop() == 0
    ended = scopegate("log", "verify", "--config", config)
    assert ended.returncode == 4, ended
    assert "the log was rewritten somewhere up to record 2" in ended.stderr
    new = ("--set", f"log.checkpoint_file={tmp_path / 'new.jsonl'}")
    ended = scopegate("log", "verify", "--config", config, *new)
    assert ended.returncode == 0, ended


def test_the_command_that_it_prints_verifies_the_backup_although_the_checkpoints_went_on(
    tmp_path: Path, backend: Backend
) -> None:
    folder = tmp_path / "with space"
    config, backup = configured(folder, backend), folder / "a backup.db"
    with Program(config) as sidecar:
        issue_scope(sidecar.data)
        assert sidecar.stop() == 0
        attested = tmp_path / "checkpoints.jsonl"
        shutil.copyfile(folder / "checkpoints.jsonl", attested)
        ended = scopegate("store", "backup", backup, "--config", config)
        assert ended.returncode == 0, ended
        sidecar.start()
        issue_scope(sidecar.data)
        assert sidecar.stop() == 0
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("ok: 1 records of writer ")
    assert lines[1].startswith(f"{backup}: {backup.stat().st_size:,} bytes, copied and verified in ")
    program, *words = shlex.split(lines[3])
    assert program == "scopegate"
    verified = scopegate(*words)
    assert verified.returncode == 0, verified
    assert verified.stdout.splitlines()[0] == lines[0]
    at = ("--set", f"store.url=sqlite:///{backup}")
    assert scopegate("log", "verify", "--config", config, *at).returncode == 4
    kept = scopegate("log", "verify", "--config", config, *at, "--set", f"log.checkpoint_file={attested}")
    assert "Attested up to record 1," in kept.stdout


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sidecar that has stopped, with nine records in its log, all of them attested."""
    folder = tmp_path_factory.mktemp("recorded")
    with Backend() as backend, Program(configured(folder, backend)) as sidecar:
        for _ in range(3):
            scope = issue_scope(sidecar.data)
            assert ask_json(sidecar.data, "POST", EXECUTE, execution(scope)).status == 200
        assert sidecar.stop() == 0
    return folder


@pytest.fixture
def folder(recorded: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(recorded, tmp_path / "copy"))


def test_a_stopped_sidecars_store_is_backed_up_too(folder: Path, tmp_path: Path) -> None:
    told = backed_up(folder / "scopegate.yaml", tmp_path / "backup.db")
    assert told["records"] == 9
    assert set(told) == {"file", "records", "head", "bytes", "seconds"}


def tamper(store: Path, *statements: str) -> None:
    with closing(sqlite3.connect(store)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


@pytest.mark.parametrize(
    ("statements", "said"),
    [
        (
            ("DROP TRIGGER decisions_are_never_deleted", "DELETE FROM decisions WHERE seq > 6"),
            "TAMPERED: records 7 to 9 are missing from the end",
        ),
        (
            ("DROP TRIGGER decisions_are_never_changed",),
            "TAMPERED: the trigger decisions_are_never_changed is",
        ),
    ],
)
def test_a_store_that_was_tampered_with_exits_4_and_leaves_no_backup(
    folder: Path, tmp_path: Path, statements: tuple[str, ...], said: str
) -> None:
    tamper(folder / "var" / "scopegate.db", *statements)
    (tmp_path / "backup").mkdir()
    target = tmp_path / "backup" / "copy.db"
    ended = scopegate("store", "backup", target, "--config", folder / "scopegate.yaml")
    assert (ended.returncode, ended.stdout) == (4, "")
    assert said in ended.stderr
    assert list(target.parent.iterdir()) == []


def test_a_file_that_is_there_is_refused_without_force(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy.db"
    target.write_text("precious")
    ended = scopegate("store", "backup", target, "--config", folder / "scopegate.yaml")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert f"cannot back up: {target} is there already; --force replaces it" in ended.stderr
    assert target.read_text() == "precious"
    assert backed_up(folder / "scopegate.yaml", target, "--force")["records"] == 9


def test_no_file_that_the_sidecar_uses_is_replaced_even_with_force(folder: Path, tmp_path: Path) -> None:
    config = folder / "scopegate.yaml"
    (tmp_path / "link").symlink_to(folder / "var" / "scopegate.db")
    (tmp_path / "folder").symlink_to(folder / "var")
    os.link(folder / "var" / "scopegate.db", tmp_path / "hard.db")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    used: dict[str | Path, str] = {
        "var/scopegate.db": "the store itself",
        "var/../var/scopegate.db": "the store itself",
        tmp_path / "link": "the store itself",
        tmp_path / "folder" / "scopegate.db": "the store itself",
        tmp_path / "hard.db": "the store itself",
        "var/scopegate.db-wal": "a part of the store",
        "var/scopegate.db-shm": "a part of the store",
        "var/scopegate.db.lock": "a part of the store",
        "scopegate.yaml": "the configuration",
        "log.key": "log.signing_key_file",
        "checkpoints.jsonl": "log.checkpoint_file",
    }
    for name, what in used.items():
        ended = scopegate("store", "backup", folder / name, "--config", config, "--force")
        assert (ended.returncode, ended.stdout) == (2, ""), (name, ended)
        assert f"is {what}; give the backup a name of its own" in ended.stderr
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_no_policy_is_replaced_and_nothing_is_put_beside_one(folder: Path, tmp_path: Path) -> None:
    config, policies = folder / "scopegate.yaml", folder / "policies"
    outside = tmp_path / "outside.yaml"
    outside.write_text("rules: []\n")
    (policies / "linked.yaml").symlink_to(outside)
    (tmp_path / "link").symlink_to(policies)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    wanted: dict[Path, str] = {
        next(policies.glob("*.yaml")): "is in the folder of the policies",
        policies / "new.yaml": "is in the folder of the policies",
        policies / "tests" / "new.db": "is in the folder of the policies",
        folder / "var" / ".." / "policies" / "new.yaml": "is in the folder of the policies",
        tmp_path / "link" / "new.yaml": "is in the folder of the policies",
        outside: "is a policy file",
    }
    for target, what in wanted.items():
        ended = scopegate("store", "backup", target, "--config", config, "--force")
        assert (ended.returncode, ended.stdout) == (2, ""), (target, ended)
        assert what in ended.stderr
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", ["a?b.db", "a#b.db"])
def test_a_name_that_no_store_url_can_hold_is_refused_at_once(
    folder: Path, tmp_path: Path, name: str
) -> None:
    before = {*tmp_path.iterdir()}
    ended = scopegate("store", "backup", tmp_path / name, "--config", folder / "scopegate.yaml")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "holds ? or #, which store.url cannot name; choose another name" in ended.stderr
    assert {*tmp_path.iterdir()} == before


def test_without_a_store_or_with_one_in_memory_it_says_so(tmp_path: Path, backend: Backend) -> None:
    config = write_configuration(tmp_path, backend.address)
    ended = scopegate("store", "backup", tmp_path / "copy.db", "--config", config)
    assert ended.returncode == 1, ended
    assert "cannot back up: there is no database" in ended.stderr
    memory = ("--set", "store.url=memory://")
    ended = scopegate("store", "backup", tmp_path / "copy.db", "--config", config, *memory)
    assert ended.returncode == 2, ended
    assert not (tmp_path / "copy.db").exists()


def test_checkpoints_of_a_key_that_is_not_known_stop_it_before_it_copies(
    folder: Path, tmp_path: Path
) -> None:
    assert scopegate("log", "keygen", tmp_path / "other").returncode == 0
    command = ("store", "backup", tmp_path / "copy.db", "--config", folder / "scopegate.yaml")
    ended = scopegate(*command, "--public-key", tmp_path / "other.pub")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "not verified whole: 1 checkpoints are of the key" in ended.stderr
    assert not (tmp_path / "copy.db").exists()
    assert scopegate(*command, "--public-key", folder / "log.key.pub").returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_whoever_stops_it_finds_nothing_left_behind(
    folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    target = tmp_path / "backup" / "copy.db"
    target.parent.mkdir()
    # Its reading of the store is held up, so that there is a time to stop it at.
    slow = "import sys, time, sidecar.store.backup as b; b.verify_sqlite = lambda *_: time.sleep(60); "
    command = ["store", "backup", str(target), "--config", str(folder / "scopegate.yaml")]
    with subprocess.Popen(
        [sys.executable, "-c", slow + "from sidecar.cli.main import main; main(sys.argv[1:])", *command],
        cwd=PROJECT,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        end = time.monotonic() + STOP_SECONDS
        while not list(target.parent.glob("*/copy.db")):
            assert time.monotonic() < end, "it never began"
            time.sleep(0.01)
        time.sleep(0.2)
        process.send_signal(number)
        _, said = process.communicate(timeout=STOP_SECONDS)
    assert process.returncode == 1, said
    assert said.strip() == "Aborted!"
    assert list(target.parent.iterdir()) == []


def test_a_backup_that_hangs_ends_before_the_wal_fills_the_disk_of_the_store(
    tmp_path: Path, backend: Backend
) -> None:
    config, target = configured(tmp_path / "one", backend), tmp_path / "backup" / "copy.db"
    target.parent.mkdir()
    # Its copying waits for ever while its reading is open, as for a disk that does not answer.
    hanging = (
        "import sys, time, sidecar.store.backup as b; b._check_room = lambda *_: time.sleep(600); "
        "b.WAL_GROWTH, b.LOOK_SECONDS, b.STANDSTILL_SECONDS = 1 << 20, 0.1, 0.5; "
        "from sidecar.cli.main import main; main(sys.argv[1:])"
    )
    command = ["store", "backup", str(target), "--config", str(config)]
    with Program(config) as sidecar:
        issue_scope(sidecar.data)
        with subprocess.Popen(
            [sys.executable, "-c", hanging, *command], cwd=PROJECT, stderr=subprocess.PIPE, text=True
        ) as process:
            sidecar.until("is being copied", lambda: bool(list(target.parent.glob("*/copy.db"))))
            time.sleep(1.0)
            assert process.poll() is None, "it hangs, but the WAL has not grown"
            with admissions(sidecar):
                _, said = process.communicate(timeout=60)
        assert process.returncode == 1, said
        assert said.startswith(f"scopegate: cannot back up: {sidecar.store}-wal has grown by "), said
        assert len(said.splitlines()) == 1
        assert not target.exists()
        assert backed_up(config, target)["records"] == len(records(sidecar.store))
        assert list(target.parent.iterdir()) == [target], "what the other left is gone"


def test_a_damaged_store_exits_4_and_the_last_backup_stays(folder: Path, tmp_path: Path) -> None:
    store, target = folder / "var" / "scopegate.db", tmp_path / "copy.db"
    backed_up(folder / "scopegate.yaml", target)
    kept = target.read_bytes()
    with closing(sqlite3.connect(store)) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'scopes'").fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    with store.open("r+b") as file:
        file.seek(page * size - 1_000)
        file.write(b"\xa5" * 1_000)
    assert scopegate("log", "verify", "--config", folder / "scopegate.yaml").returncode == 0
    ended = scopegate("store", "backup", target, "--force", "--config", folder / "scopegate.yaml")
    assert (ended.returncode, ended.stdout) == (4, "")
    assert f"TAMPERED: the copy of {store} is damaged: " in ended.stderr
    assert target.read_bytes() == kept


def test_a_name_that_is_no_text_is_refused_at_once(folder: Path, tmp_path: Path) -> None:
    before = {*tmp_path.iterdir()}
    target = os.fsdecode(os.fsencode(tmp_path) + b"/non\xff.db")
    ended = scopegate("store", "backup", target, "--config", folder / "scopegate.yaml")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "is not UTF-8, so store.url cannot name it; choose another name" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert {*tmp_path.iterdir()} == before


def test_status_and_metrics_say_what_the_disk_says(tmp_path: Path, backend: Backend) -> None:
    with Program(write_configuration(tmp_path, backend.address)) as sidecar:
        for _ in range(40):
            issue_scope(sidecar.data)
        told = status_of(sidecar)
        disk = os.statvfs(sidecar.store)
        assert told["url"] == f"sqlite:///{sidecar.store}"
        assert told["size"] == sidecar.store.stat().st_size
        assert told["wal_size"] == os.stat(f"{sidecar.store}-wal").st_size > 0
        # Other programs write to the disk meanwhile.
        assert told["free"] == pytest.approx(disk.f_bavail * disk.f_frsize, rel=0.2, abs=1 << 30)
        assert 10_000 < told["growth_per_day"] < says(sidecar.store)
        assert metric(sidecar, "scopegate_store_size_bytes") == sidecar.store.stat().st_size
        # Readiness writes what means nothing, so the WAL grows with each look at the metrics.
        assert told["wal_size"] <= metric(sidecar, "scopegate_store_wal_size_bytes")
        free = metric(sidecar, "scopegate_store_free_bytes")
        assert free == pytest.approx(told["free"], rel=0.2, abs=1 << 30)
        assert metric(sidecar, "scopegate_store_growth_bytes") == told["growth_per_day"]

"""Programs that use the emitters with no sidecar beside them, to their end and over it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sidecar.decisions import get_decision_service
from sidecar.store.verify import verify_sqlite
from tests.library.recorded import decided, records

PROJECT = Path(__file__).parents[2]


def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A program of its own, without any sidecar beside it."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


PLAIN = """
import sys
from sidecar.decisions import backfill_run_id_for_request, configure
from sidecar.decisions import emit_policy_decision, emit_routing_decision

if sys.argv[1:]:
    configure(sys.argv[1])
emit_routing_decision(None, True, "agent-7", ["agent-7"], request_id="req-1")
assert backfill_run_id_for_request("req-1", "run-1") == 1
print(emit_policy_decision("run-1", "no-pii", True).decision_outcome.value)
"""


def test_a_program_of_ten_lines_needs_nothing_else_and_ends_by_itself() -> None:
    ended = run(PLAIN)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "selected\n", "")


def test_what_a_program_left_is_in_its_file_when_it_has_ended(tmp_path: Path) -> None:
    database = tmp_path / "decisions.db"
    for number in (1, 2):
        ended = run(PLAIN, f"sqlite:///{database}")
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "selected\n", "")
        assert verify_sqlite(database).records == 2 * number


LAST_WORDS = """
import atexit, sys, threading
from sidecar.decisions import *
configure(sys.argv[1])
record = emit_routing_decision(None, True, "a")
def emit(decision_id):
    return get_decision_service().emit_sync(record.model_copy(update={"decision_id": decision_id}))
def after_main():
    threading.main_thread().join()
    assert emit("after main") is True
    print("after main")
threading.Thread(target=after_main).start()
atexit.register(lambda: print("at exit", emit("at exit")))
sys.exit(3)
"""


def test_a_program_may_emit_while_it_ends_and_ends_all_the_same(tmp_path: Path) -> None:
    database = tmp_path / "decisions.db"
    ended = run(LAST_WORDS, f"sqlite:///{database}")
    first, last = ended.stdout.splitlines()
    assert (ended.returncode, first) == (3, "after main"), ended.stderr
    assert last in ("at exit True", "at exit False")
    assert verify_sqlite(database).records == 2 + (last == "at exit True")


FULL = """
import asyncio, os, resource, sys
from sidecar.decisions import *
from tests.library.recorded import decided
configure(sys.argv[1])
service = get_decision_service()
assert service.emit_sync(decided(run_id="before"))
limit = os.stat(sys.argv[1].removeprefix("sqlite:///") + "-wal").st_size + 4096
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
large = {"padding": "x" * 50_000}
assert service.emit_sync(decided(details=large)) is False
assert asyncio.run(service.emit(decided(details=large))) is False
assert emit_routing_decision("lost", True, "a", details=large) is not None
assert service.failures == 3
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert service.emit_sync(decided(run_id="after"))
"""


def test_a_disk_that_is_full_costs_the_records_that_do_not_fit(tmp_path: Path) -> None:
    database = tmp_path / "decisions.db"
    ended = run(FULL, f"sqlite:///{database}")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("the store did not confirm") == 3
    assert verify_sqlite(database).records == 2


CHILD = """
import os, sys, time
from sidecar.decisions import *
configure(sys.argv[1])
assert emit_routing_decision("parent", True, "a")
service = get_decision_service()
child = os.fork()
if child == 0:
    begun = time.monotonic()
    service.emit_sync(emit_routing_decision("child", True, "a"))
    os._exit(0 if time.monotonic() - begun < 20 else 1)
assert os.waitpid(child, 0)[1] == 0
assert emit_routing_decision("parent", True, "a")
assert service.failures == 0
"""


@pytest.mark.parametrize("store", ["memory://", "sqlite"])
def test_a_forked_child_may_emit_and_leaves_its_parent_s_log_whole(tmp_path: Path, store: str) -> None:
    database = tmp_path / "decisions.db"
    ended = run(CHILD, store if store == "memory://" else f"sqlite:///{database}")
    assert ended.returncode == 0, ended.stderr
    if store == "sqlite":
        assert verify_sqlite(database).records == 2


LOCKED = """
import sys, time
from sidecar.decisions import *
from sidecar.errors import StoreUnavailable
try:
    configure(sys.argv[1])
except StoreUnavailable as exc:
    assert "in use by another process" in str(exc)
begun = time.monotonic()
assert emit_routing_decision(None, True, "a") is not None
assert get_decision_service().failures == 1
assert is_care_kill_switch_active() is True
assert time.monotonic() - begun < 5
"""


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_a_database_of_another_process_is_left_alone(store_url: str) -> None:
    assert get_decision_service().emit_sync(decided(run_id="ours"))
    ended = run(LOCKED, store_url)
    assert ended.returncode == 0, ended.stderr
    assert [each["run_id"] for each in records()] == ["ours"]

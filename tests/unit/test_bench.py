"""The bench: what wrk prints is read, what was measured is added up, and a failure is never a figure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from sidecar.policies import files as policyfiles
from tests.bench import chart, comparisons, load, report, targets
from tests.bench.__main__ import PACKAGES, WHERE_FROM, missing
from tests.bench.processes import BenchError, Cores, Program, accepts
from tests.bench.report import Figure, Result

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="cores and /proc are Linux's")
WRK = """Running 1s test @ http://127.0.0.1:1/x
  1 threads and 64 connections
  4 requests in 2.00s, 1.06MB read
Requests/sec:      2.00
"""
FIGURES: dict[str, int] = {
    "requests": 4,
    "microseconds": 2_000_000,
    "p50": 1500,
    "p99": 9000,
    "connect": 0,
    "read": 0,
    "write": 0,
    "status": 0,
    "timeout": 0,
}
RATIO = Figure("ratio", lambda a, b: a["rate"] / b["rate"], at_least=1.0)
RESULT = Result(
    "one-two",
    "One / <two>",
    "one",
    "two",
    (RATIO,),
    [({"rate": rate, "p99_ms": 2.0}, {"rate": 100.0, "p99_ms": 4.0}) for rate in (90.0, 300.0, 110.0)],
)
CONDITIONS = {"pairs": 3, "seconds": 8, "connections": 64, "processor": "A & B", "date": "2026-01-01"}


def printed(**changed: int) -> str:
    return WRK + load.MARK + json.dumps({**FIGURES, **changed}) + "\n"


def test_what_wrk_measured_is_read_from_its_output() -> None:
    assert load.measured(printed()) == load.Load(requests=4, seconds=2.0, p50=1500, p99=9000)


@pytest.mark.parametrize("kind", ["connect", "read", "write", "status", "timeout"])
def test_a_run_with_a_failed_request_is_no_measurement(kind: str) -> None:
    with pytest.raises(BenchError, match=f"some failed: {kind} 2"):
        load.measured(printed(**{kind: 2}))


def test_output_without_the_measurement_is_shown() -> None:
    with pytest.raises(BenchError, match="unable to connect"):
        load.measured("unable to connect to 127.0.0.1\n")


def test_a_body_has_three_hundred_bytes_and_the_members_of_an_execution() -> None:
    body = load.body("scope_1", "inc_1")
    assert len(body) == load.BODY_BYTES
    assert json.loads(body).keys() == {"scope_id", "incident_id", "action", "parameters"}


def test_the_script_holds_each_request_and_refuses_what_lua_would_misread() -> None:
    script = load.script([load.Request({"X-Scope-Id": "s"}, "{}"), load.Request({}, '{"a": "%d"}')])
    assert "[ [==[X-Scope-Id]==] ] = [==[s]==]" in script
    assert '[==[{"a": "%d"}]==],' in script
    with pytest.raises(ValueError, match="cannot be quoted"):
        load.script([load.Request({}, "]==]")])


def test_a_figure_is_the_median_of_the_pairs_with_the_lowest_and_the_highest() -> None:
    assert report.outcome(RESULT, RATIO) == pytest.approx((1.1, 0.9, 3.0))
    assert report.side(RESULT, 0)["rate"] == (110.0, 90.0, 300.0)


def test_a_measure_that_one_run_lacks_is_not_shown() -> None:
    lacking = Result("x", "x", "a", "b", (), [({"rate": 1.0, "p99_ms": 1.0}, {}), ({"rate": 2.0}, {})])
    assert report.side(lacking, 0).keys() == {"rate"}


def test_the_table_says_whether_a_figure_holds() -> None:
    table = report.tables([RESULT])
    assert "110 [90-300]" in table
    assert "1.10 [0.90-3.00]" in table
    assert table.rstrip().endswith("yes")
    missed = Result("y", "y", "a", "b", (RATIO,), [({"rate": 1.0}, {"rate": 2.0})])
    assert report.tables([missed]).rstrip().endswith("NO")
    assert Figure("p99", RATIO.compute, at_most=0.6).holds(0.7) is False
    assert Figure("free", RATIO.compute).holds(0.7) is None


def test_the_files_hold_every_run_and_a_picture_for_light_and_dark(tmp_path: Path) -> None:
    files = report.write(tmp_path / "out", [RESULT], CONDITIONS)
    assert [file.name for file in files] == ["bench.json", "bench-light.svg", "bench-dark.svg"]
    said: dict[str, Any] = json.loads(files[0].read_text(encoding="utf-8"))
    (comparison,) = said["comparisons"]
    assert comparison["pairs"][1] == [{"rate": 300.0, "p99_ms": 2.0}, {"rate": 100.0, "p99_ms": 4.0}]
    assert comparison["figures"][0]["values"] == pytest.approx([0.9, 3.0, 1.1])
    assert said["conditions"] == CONDITIONS
    for file, colours in ((files[1], chart.LIGHT), (files[2], chart.DARK)):
        root = ElementTree.parse(file).getroot()
        texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
        assert "One / <two>" in texts
        assert "110" in texts
        assert colours.ground in file.read_text(encoding="utf-8")
        bars = [each for each in root.iter("{http://www.w3.org/2000/svg}rect") if each.get("x")]
        lengths = [float(each.get("width", "0")) for each in bars]
        assert lengths[0] / lengths[1] == pytest.approx(110 / 100, rel=0.01)


def test_every_comparison_has_a_name_of_its_own_and_needs_only_what_can_be_named() -> None:
    every = (*comparisons.COMPARISONS, *comparisons.against(Path("/elsewhere")))
    names = [each.name for each in comparisons.COMPARISONS]
    assert len(set(names)) == len(names)
    assert {need for each in every for need in each.needs} <= {*WHERE_FROM, *PACKAGES}


def test_what_is_missing_is_named_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tests.bench.__main__.PATHS", str(tmp_path))
    assert missing(comparisons.COMPARISONS)[:2] == [
        "wrk is not installed: apt-get install wrk",
        "nginx is not installed: apt-get install nginx-light",
    ]


@pytest.mark.parametrize(("actions", "about"), [(1, 100), (10, 10)])
def test_the_hundred_rules_are_valid_and_about_the_measured_action(
    actions: int, about: int, tmp_path: Path
) -> None:
    catalogue = f"actions:\n  {load.ACTION}: {{risk: low}}\n"
    (tmp_path / "actions.yaml").write_text(catalogue, encoding="utf-8")
    (tmp_path / "rules.yaml").write_text(comparisons.hundred_rules(actions), encoding="utf-8")
    policies = policyfiles.load(tmp_path)
    assert len(policies.rules) == 100
    assert len(policies.about("execute", load.ACTION)) == about


def test_a_configuration_of_a_peer_is_filled_in_whole(tmp_path: Path) -> None:
    rig = targets.Rig(tmp_path, Cores(0, 0), backend=9000)
    for name in ("backend.conf", "nginx_proxy.conf", "nginx_auth_request.conf", "envoy.yaml", "common.conf"):
        text = rig.fill(name, tmp_path, PORT=8000, AUTHORIZER=7000, ANSWER="{}").read_text(encoding="utf-8")
        assert "@" not in text.replace('"@type"', "")


def _has_ended(pid: int) -> bool:
    """Whether a killed process ends. The kernel ends it when it next runs, so this waits for it."""
    stat = Path(f"/proc/{pid}/stat")
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            state = stat.read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":  # its parent has not waited for it yet
            return True
        time.sleep(0.01)
    return False


@ON_LINUX
def test_a_program_runs_on_its_core_is_measured_with_its_children_and_ends(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    code = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "sum(range(3_000_000))\n"
        "os.write(1, ' '.join(map(str, [child.pid, *os.sched_getaffinity(0)])).encode())\n"  # in one piece
        "child.wait()\n"
    )
    program = Program("sums", [sys.executable, "-c", code], core=core, folder=tmp_path)
    try:
        program.wait_for(lambda: program.tail() != "")
        child, *cores = map(int, program.tail().split())
        assert cores == [core]
        assert child in program._pids()
        assert program.cpu_seconds() > 0
        assert program.resident_bytes() > 1 << 20
    finally:
        program.stop()
    assert _has_ended(child)


@ON_LINUX
def test_a_program_that_ends_while_it_starts_shows_its_last_output(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such key')"]
    program = Program("broken", command, core=min(os.sched_getaffinity(0)), folder=tmp_path)
    with pytest.raises(BenchError, match=r"broken ended with 1 instead of starting(.|\n)*no such key"):
        program.wait_for(lambda: accepts(1))
    program.stop()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--only", "nothing"], "--only nothing: there are gated-bare"),
        (["--against", "/nonexistent"], "there is no sidecar/"),
        (["--pairs", "0"], "at least 1"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_starts(arguments: list[str], complaint: str) -> None:
    command = [sys.executable, "-m", "tests.bench", *arguments]
    ran = subprocess.run(command, cwd=targets.CHECKOUT, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert complaint in ran.stderr

"""The demo: what a newcomer sees first has to work."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sidecar.cli.demo import Walk, running

PROJECT = Path(__file__).parents[2]
DEMO = [sys.executable, "-m", "sidecar", "demo"]
SECONDS = 30.0


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(folder), "PYTHONUTF8": "1"}


def test_once_walks_through_all_five_steps_and_leaves_nothing_behind(tmp_path: Path) -> None:
    shown = subprocess.run(
        [*DEMO, "--once"],
        cwd=PROJECT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert shown.stderr == ""
    for step, verdict in {
        "A1": "✓ expected 400: scoped_execution_required",
        "A2": "✓ expected 201: scope_id, expires_at and intent",
        "A3": "✓ expected 200: the backend's own success, and the scope is exhausted",
        "A4": "✓ expected 400: scope_exhausted",
        "A5": "✓ expected 403: action_outside_scope",
    }.items():
        _, _, below = shown.stdout.partition(f"\n{step}  ")
        assert verdict in below.split("\n\n")[0]
    assert shown.stdout.count('"status": "active"') == 1, "the status of the scope, as A2 answers it"
    assert "✓ expected one call of the backend: retry_agent for inc_123" in shown.stdout
    assert "✗" not in shown.stdout
    assert "\x1b" not in shown.stdout  # no colour where nobody looks
    assert list(tmp_path.iterdir()) == []


async def test_a_walk_without_the_gate_holds_in_no_step(capsys: pytest.CaptureFixture[str]) -> None:
    async with running() as demo:
        assert not await Walk(demo.backend).all_steps()
    shown = capsys.readouterr().out
    assert shown.count("✗") == 5
    assert "✗ expected 400: scoped_execution_required, but it answered 200" in shown


@contextmanager
def demonstration(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A demo that runs, and the file to which it prints; it has printed all that it prints by itself."""
    output = folder / "output"
    temporary = folder / "temporary"
    temporary.mkdir()
    with output.open("wb") as out, (folder / "errors").open("wb") as errors:
        process = subprocess.Popen(DEMO, cwd=PROJECT, env=environment(temporary), stdout=out, stderr=errors)
    try:
        end = time.monotonic() + SECONDS
        while b"Ctrl-C" not in output.read_bytes():
            assert process.poll() is None, (folder / "errors").read_text()
            assert time.monotonic() < end, "the demo prints nothing"
            time.sleep(0.02)
        yield process, output
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_demo_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    with demonstration(tmp_path) as (process, output):
        process.send_signal(number)
        assert process.wait(SECONDS) == 0
    assert output.read_text(encoding="utf-8").endswith("Stopped.\n")
    assert (tmp_path / "errors").read_text() == ""
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_the_commands_that_the_demo_prints_work_as_they_are(tmp_path: Path) -> None:
    with demonstration(tmp_path) as (process, output):
        printed = output.read_text(encoding="utf-8")
        script = printed[printed.index("# A1.") : printed.index("Ctrl-C")]
        ran = subprocess.run(
            ["sh", "-e", "-c", script], capture_output=True, text=True, timeout=SECONDS, check=False
        )
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 0
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    places = [
        ran.stdout.find(expected)
        for expected in (
            '"error":"scoped_execution_required"',
            "201 Created",
            "Scopegate-Scope-Status: exhausted",
            '"error":"scope_exhausted"',
            '"error":"action_outside_scope"',
            '"total":1',
            '"status":"revoked"',
            '"agents"',
            '"decisions"',
            '"executions"',
            '"ready":true',
            "scopegate_decisions_total{",
        )
    ]
    assert -1 not in places, ran.stdout
    assert places == sorted(places)

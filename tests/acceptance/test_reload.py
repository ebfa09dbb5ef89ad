"""Reloading as whoever runs it meets it: by signal, by call and by itself; whole, or not at all."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.acceptance.conftest import (
    ASK_SECONDS,
    EXECUTE,
    PROJECT,
    Backend,
    Program,
    ask,
    ask_json,
    execution,
    issue_scope,
    write_configuration,
)
from tests.client import Message
from tests.described import Described

# policies.md promises that a change is taken up by itself; this is how long somebody may have to wait.
MOST_SECONDS = 2.0

GOOD = "actions:\n  retry_agent: {risk: low, max_cost_usd: 0.01}\n  restart_agent: {risk: medium}\n"
WITHOUT_RETRY = "actions:\n  restart_agent: {risk: medium}\n"


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend() as running:
        yield running


@pytest.fixture
def config(tmp_path: Path, backend: Backend) -> Path:
    return write_configuration(tmp_path, backend.address)


@pytest.fixture
def sidecar(config: Path) -> Iterator[Program]:
    with Program(config) as running:
        yield running


def policy(config: Path, text: str) -> None:
    """One rename puts the file in its place, so that it is never read half."""
    file = config.parent / "policies" / "actions.yaml"
    file.with_name(".new").write_text(text)
    os.replace(file.with_name(".new"), file)


def configure(config: Path, **sections: dict[str, Any]) -> None:
    """The same configuration with these keys set, in its place by one rename."""
    document = yaml.safe_load(config.read_text())
    for name, section in sections.items():
        document[name] = {**document.get(name, {}), **section}
    config.with_name(".new").write_text(yaml.safe_dump(document, sort_keys=False))
    os.replace(config.with_name(".new"), config)


def status(sidecar: Program) -> dict[str, Any]:
    shown: dict[str, Any] = ask(sidecar.admin, "GET", "/api/v1/status").json()
    return shown


def reload(sidecar: Program) -> Message:
    answer = ask(sidecar.admin, "POST", "/api/v1/reload")
    described = Described(ask(sidecar.admin, "GET", "/openapi.json").json())
    described.assert_answered("reload", answer)
    return answer


def reloads(sidecar: Program, cause: str | None = None) -> list[dict[str, Any]]:
    """What the log says of reloads."""
    lines = [line for line in sidecar.log_lines() if line["logger"] == "scopegate.reload" and "cause" in line]
    return [line for line in lines if cause in (None, line["cause"])]


def changed(sidecar: Program) -> set[str]:
    """Every key that a reload changed; the call and the watching may each have been the first to see it."""
    return {key for line in reloads(sidecar) for key in line.get("changed", ())}


def refused_as_unknown(sidecar: Program) -> bool:
    """Whether `retry_agent` is in the policies no longer: then nobody gets a scope for it."""
    asked = {"incident_id": "inc-1", "action": "retry_agent", "intent": "a test"}
    answer = ask_json(sidecar.data, "POST", "/api/v1/recovery/scope", asked)
    assert answer.status in (201, 403), answer
    return answer.status == 403


def seconds_until(sidecar: Program, holds: Callable[[], bool]) -> float:
    begun = time.monotonic()
    sidecar.until("takes up the change", lambda: holds() or None, MOST_SECONDS)
    return time.monotonic() - begun


def refused_as_unlisted(sidecar: Program, method: str = "POST", path: str = "/pods/cart-0") -> bool:
    answer = ask(sidecar.data, method, path) if method == "GET" else ask_json(sidecar.data, method, path, {})
    assert answer.status in (200, 403), answer
    return answer.status == 403


# By signal and by call ----------------------------------------------------------------------------------


def test_sighup_reloads_and_the_sidecar_goes_on(sidecar: Program, config: Path) -> None:
    before = status(sidecar)
    sidecar.signal(signal.SIGHUP)
    sidecar.until("says that nothing is different", lambda: reloads(sidecar, "signal"))
    assert status(sidecar)["policy_revision"] == before["policy_revision"]
    policy(config, WITHOUT_RETRY)
    sidecar.signal(signal.SIGHUP)
    sidecar.until("reloads again", lambda: len(reloads(sidecar, "signal")) == 2 or None)
    after = status(sidecar)
    assert refused_as_unknown(sidecar)
    assert after["policy_revision"] != before["policy_revision"]
    assert after["config_revision"] == before["config_revision"]
    assert after["last_reload"]["ok"] is True
    assert after["last_reload"]["time"] > before["last_reload"]["time"]
    assert sidecar.stop() == 0


def test_the_call_answers_once_the_new_set_is_in_force(sidecar: Program, config: Path) -> None:
    first = reload(sidecar)
    assert (first.status, first.json()["changed"], first.json()["shadowed"]) == (200, [], [])
    assert first.json()["policy_revision"] == status(sidecar)["policy_revision"]
    for text in (WITHOUT_RETRY, GOOD, WITHOUT_RETRY):
        policy(config, text)
        answer = reload(sidecar)
        assert answer.status == 200, answer
        assert refused_as_unknown(sidecar) == (text is WITHOUT_RETRY)
        shown = status(sidecar)
        assert answer.json()["policy_revision"] == shown["policy_revision"]
        assert answer.json()["config_revision"] == shown["config_revision"]
    assert changed(sidecar) == {"policies"}
    metrics = ask(sidecar.ops, "GET", "/metrics").body.decode()
    assert 'scopegate_reloads_total{result="ok"} 3.0' in metrics
    assert 'scopegate_reloads_total{result="refused"} 0.0' in metrics
    assert "scopegate_last_reload_success 1.0" in metrics


def test_what_becomes_of_unlisted_requests_can_change_live(sidecar: Program, config: Path) -> None:
    def announced() -> list[tuple[str, str, list[str]]]:
        lines = [
            line for line in sidecar.log_lines() if line["message"].startswith("what becomes of requests")
        ]
        return [(line["reads"], line["writes"], line["excepted"]) for line in lines]

    assert not refused_as_unlisted(sidecar)
    for unlisted, refused in (
        ({"writes": "refuse"}, True),
        ({"writes": "refuse", "except": ["/pods/{pod}/restart", "**/cart-0"]}, False),
        ({"writes": "record"}, False),
        ({"reads": "refuse"}, False),
    ):
        configure(config, gate={"unlisted": unlisted})
        assert reload(sidecar).status == 200
        assert refused_as_unlisted(sidecar) == refused
        wanted = {"reads": "pass", "writes": "pass", "excepted": unlisted.get("except", [])}
        assert status(sidecar)["unlisted"] == wanted | {k: v for k, v in unlisted.items() if k != "except"}
    assert refused_as_unlisted(sidecar, "GET", "/elsewhere")
    query = "/api/v1/decisions?event="
    (recorded,) = ask(sidecar.admin, "GET", query + "unlisted").json()["decisions"]
    assert recorded["decision_inputs"]["path"] == "/pods/cart-0"
    refusals = ask(sidecar.admin, "GET", query + "refused").json()["decisions"]
    assert [one["decision_inputs"]["method"] for one in refusals] == ["GET", "POST"]
    assert announced() == [
        ("pass", "pass", []),
        ("pass", "refuse", []),
        ("pass", "refuse", ["/pods/{pod}/restart", "**/cart-0"]),
        ("pass", "record", []),
        ("refuse", "pass", []),
    ]
    policy(config, WITHOUT_RETRY)
    assert reload(sidecar).status == 200
    assert len(announced()) == 5


def test_requests_in_flight_end_under_the_policies_that_they_began_with(
    sidecar: Program, config: Path, backend: Backend
) -> None:
    scope, late = issue_scope(sidecar.data), issue_scope(sidecar.data)
    backend.go_on.clear()
    with ThreadPoolExecutor() as aside:
        running = aside.submit(ask_json, sidecar.data, "POST", EXECUTE, execution(scope))
        sidecar.until("executes", lambda: backend.seen)
        policy(config, WITHOUT_RETRY)
        assert reload(sidecar).status == 200
        refused = ask_json(sidecar.data, "POST", EXECUTE, execution(late))
        assert (refused.status, refused.json()["error"]) == (403, "policy_denied")
        backend.go_on.set()
        answer = running.result(ASK_SECONDS)
    assert (answer.status, answer.json()) == (200, {"done": True})
    assert len(backend.seen) == 1


@pytest.mark.slow
def test_under_load_every_request_is_judged_by_one_of_the_two_sets(sidecar: Program, config: Path) -> None:
    scopes = [issue_scope(sidecar.data, attempts=10) for _ in range(30)]

    def load(mine: list[str]) -> list[Message]:
        return [ask_json(sidecar.data, "POST", EXECUTE, execution(scope)) for scope in mine for _ in range(8)]

    with ThreadPoolExecutor() as aside:
        clients = [aside.submit(load, scopes[number::3]) for number in range(3)]
        turns = 0
        while not all(client.done() for client in clients):
            policy(config, GOOD if turns % 2 else WITHOUT_RETRY)
            assert ask(sidecar.admin, "POST", "/api/v1/reload").status == 200
            turns += 1
        answers = [answer for client in clients for answer in client.result()]
    assert turns > 3
    assert {answer.status for answer in answers} == {200, 403}
    assert {answer.json()["error"] for answer in answers if answer.status == 403} == {"policy_denied"}


# What is configured -------------------------------------------------------------------------------------


def test_what_is_configured_can_change_live(sidecar: Program, config: Path, backend: Backend) -> None:
    document = ask(sidecar.admin, "GET", "/openapi.json").json()
    before = status(sidecar)
    configure(
        config,
        gate={
            "routes": [{"path": "**/recovery/execute"}, {"path": "/heal", "mode": "shadow"}],
            "max_body_bytes": 200,
            "annotate_response": True,
            "scope_required_from": "medium",
        },
        scopes={"defaults": {"max_attempts": 2, "ttl_seconds": 60}, "limits": {"max_attempts": 3}},
        care={"min_confidence": 0.9},
        upstream={"response_timeout_seconds": 1},
    )
    answer = reload(sidecar)
    assert answer.status == 200, answer
    assert changed(sidecar) == {
        "gate.routes",
        "gate.max_body_bytes",
        "gate.annotate_response",
        "gate.scope_required_from",
        "scopes.defaults.max_attempts",
        "scopes.defaults.ttl_seconds",
        "scopes.limits.max_attempts",
        "care.min_confidence",
        "upstream.response_timeout_seconds",
    }
    after = status(sidecar)
    assert after["config_revision"] == answer.json()["config_revision"] != before["config_revision"]
    assert after["policy_revision"] == before["policy_revision"]
    warned = [line["message"] for line in sidecar.log_lines() if line["level"] == "WARNING"]
    assert "actions below medium risk need no scope" in warned
    assert any("shadow" in message for message in warned)

    asked = {"incident_id": "inc-1", "action": "retry_agent", "intent": "a test"}
    granted = ask_json(sidecar.data, "POST", "/api/v1/recovery/scope", asked).json()
    assert granted["attempts_remaining"] == 2
    above = ask_json(sidecar.data, "POST", "/api/v1/recovery/scope", {**asked, "max_attempts": 4})
    assert (above.status, above.json()["error"]) == (422, "invalid_scope")
    executed = ask_json(sidecar.data, "POST", EXECUTE, execution(granted["scope_id"]))
    assert executed.json()["scope_id"] == granted["scope_id"]
    large = {**execution(granted["scope_id"]), "parameters": {"text": "x" * 200}}
    assert ask_json(sidecar.data, "POST", EXECUTE, large).status == 413
    needless = {"incident_id": "inc-1", "action": "retry_agent"}
    assert ask_json(sidecar.data, "POST", EXECUTE, needless).status == 200
    needed = ask_json(sidecar.data, "POST", EXECUTE, {**needless, "action": "restart_agent"})
    assert (needed.status, needed.json()["error"]) == (400, "scoped_execution_required")
    shadowed = ask_json(sidecar.data, "POST", "/heal", {**needless, "action": "restart_agent"})
    assert shadowed.status == 200
    choice = {
        "request_id": "r",
        "baseline_agent": "a",
        "optimized_agent": "b",
        "confidence_score": 0.8,
        "signals_used": ["latency_p50"],
        "optimization_enabled": True,
        "shadow_mode": False,
    }
    assert ask_json(sidecar.admin, "POST", "/api/v1/decisions/care_optimization", choice).json() is None
    now = ask(sidecar.admin, "GET", "/openapi.json").json()
    assert "/heal" in now["paths"].keys() - document["paths"].keys()
    terms = now["components"]["schemas"]["ScopeRequest"]["properties"]["max_attempts"]
    assert (terms["maximum"], terms["default"]) == (3, 2)
    backend.go_on.clear()
    slow = ask_json(sidecar.data, "POST", EXECUTE, execution(granted["scope_id"]))
    assert (slow.status, slow.json()["error"]) == (504, "upstream_timeout")


def test_a_drain_that_was_shortened_live_is_short(sidecar: Program, config: Path, backend: Backend) -> None:
    scope = issue_scope(sidecar.data)
    configure(config, shutdown={"drain_seconds": 0.5})
    assert reload(sidecar).status == 200
    backend.go_on.clear()
    with ThreadPoolExecutor() as aside:
        running = aside.submit(ask_json, sidecar.data, "POST", EXECUTE, execution(scope))
        sidecar.until("executes", lambda: backend.seen)
        begun = time.monotonic()
        sidecar.signal(signal.SIGTERM)
        assert sidecar.wait() == 0
        assert time.monotonic() - begun < 4
        assert running.result(ASK_SECONDS).json()["error"] == "upstream_timeout"


def test_a_reload_that_is_refused_keeps_all_of_the_old_and_says_where_it_is_wrong(
    sidecar: Program, config: Path
) -> None:
    before = status(sidecar)
    policy(config, "actions:\n  restart_agent: {risk: medium}\n  retry_agent: {risk: dreadful}\n  x: 5\n")
    configure(config, gate={"max_in_flight": 5})
    refused = reload(sidecar)
    assert (refused.status, refused.json()["error"]) == (409, "reload_refused")
    file = config.parent / "policies" / "actions.yaml"
    told = refused.json()["errors"]
    assert [error.partition(": ")[0] for error in told] == [f"{file}:3:17", f"{file}:4:3"]
    assert "actions.retry_agent.risk: expects one of low, medium, high, critical" in told[0]
    assert told[0] in refused.json()["message"]
    after = status(sidecar)
    assert (after["config_revision"], after["policy_revision"]) == (
        before["config_revision"],
        before["policy_revision"],
    )
    assert (after["last_reload"]["ok"], after["last_reload"]["errors"]) == (False, told)
    assert not refused_as_unknown(sidecar)
    metrics = ask(sidecar.ops, "GET", "/metrics").body.decode()
    assert "scopegate_last_reload_success 0.0" in metrics
    assert ask(sidecar.ops, "GET", "/health/ready").status == 200
    (line,) = [line for line in reloads(sidecar, "call") if line["level"] == "ERROR"]
    assert line["errors"] == told

    policy(config, WITHOUT_RETRY)
    assert reload(sidecar).status == 200
    assert refused_as_unknown(sidecar)
    assert changed(sidecar) == {"gate.max_in_flight", "policies"}
    assert status(sidecar)["last_reload"]["ok"] is True
    assert sidecar.stop() == 0


def test_a_key_that_cannot_change_live_refuses_all_of_the_reload_by_its_name(
    sidecar: Program, config: Path
) -> None:
    before = status(sidecar)
    configure(config, store={"deadline_seconds": 3}, gate={"max_in_flight": 5})
    configure(config, store={"url": "sqlite:///var/s3cret.db"})
    policy(config, WITHOUT_RETRY)
    refused = reload(sidecar)
    assert (refused.status, refused.json()["error"]) == (409, "reload_refused")
    assert [error.split(": ")[1] for error in refused.json()["errors"]] == [
        "store.url",
        "store.deadline_seconds",
    ]
    lines = config.read_text().splitlines()
    for error in refused.json()["errors"]:
        name, line, column = error.split(": ")[0].rsplit(":", 2)
        key = error.split(": ")[1].partition(".")[2]
        assert (name, lines[int(line) - 1][int(column) - 1 :].split(":")[0]) == (str(config), key)
        assert "restart" in error
    assert b"s3cret" not in refused.body
    assert "s3cret" not in sidecar.log()
    after = status(sidecar)
    for name in ("config_revision", "policy_revision"):
        assert after[name] == before[name]
    assert after["store"]["url"] == before["store"]["url"]
    assert not refused_as_unknown(sidecar)
    assert not (config.parent / "var" / "s3cret.db").exists()


def test_the_environment_of_the_start_still_wins_and_what_it_shadows_is_named(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCOPEGATE_SCOPES__DEFAULTS__MAX_ATTEMPTS", "3")
    monkeypatch.setenv("SCOPEGATE_STORE__DEADLINE_SECONDS", "7")
    monkeypatch.setenv("TTL", "100")
    with Program(config) as sidecar:
        monkeypatch.undo()
        configure(
            config,
            store={"deadline_seconds": 4},
            scopes={"defaults": {"max_attempts": 5, "ttl_seconds": "${TTL}"}},
        )
        # A number that is filled in is quoted by nobody.
        config.write_text(config.read_text().replace("'${TTL}'", "${TTL}"))
        answer = reload(sidecar)
        assert answer.status == 200, answer
        assert answer.json()["shadowed"] == ["store.deadline_seconds", "scopes.defaults.max_attempts"]
        asked = {"incident_id": "inc-1", "action": "retry_agent", "intent": "a test"}
        granted = ask_json(sidecar.data, "POST", "/api/v1/recovery/scope", asked).json()
        assert granted["attempts_remaining"] == 3
        assert changed(sidecar) == {"scopes.defaults.ttl_seconds"}


def test_while_it_drains_it_does_not_reload(sidecar: Program, config: Path, backend: Backend) -> None:
    scope = issue_scope(sidecar.data)
    backend.go_on.clear()
    with ThreadPoolExecutor() as aside:
        running = aside.submit(ask_json, sidecar.data, "POST", EXECUTE, execution(scope))
        sidecar.until("executes", lambda: backend.seen)
        sidecar.signal(signal.SIGTERM)
        sidecar.until_logged("draining")
        before = status(sidecar)
        policy(config, WITHOUT_RETRY)
        sidecar.signal(signal.SIGHUP)
        sidecar.until("refuses to", lambda: reloads(sidecar, "signal"))
        refused = ask(sidecar.admin, "POST", "/api/v1/reload")
        assert (refused.status, refused.json()["error"]) == (409, "reload_refused")
        assert status(sidecar)["policy_revision"] == before["policy_revision"]
        backend.go_on.set()
        assert running.result(ASK_SECONDS).status == 200
    assert sidecar.wait() == 0
    assert changed(sidecar) == set()


def test_what_lets_actions_through_is_warned_of_at_the_start(tmp_path: Path, backend: Backend) -> None:
    config = write_configuration(
        tmp_path,
        backend.address,
        gate={"scope_required_from": "critical", "routes": [{"path": "/heal", "mode": "shadow"}]},
    )
    with Program(config) as sidecar:
        warned = sidecar.until_logged("actions below critical risk need no scope")
        assert warned["level"] == "WARNING"
        assert sidecar.until(
            "warns of shadow",
            lambda: [line for line in sidecar.log_lines() if line.get("routes") == ["/heal"]],
        )


# By itself ----------------------------------------------------------------------------------------------


def test_changed_files_are_taken_up_by_themselves(sidecar: Program, config: Path) -> None:
    policies = config.parent / "policies"
    policy(config, WITHOUT_RETRY)
    assert seconds_until(sidecar, lambda: refused_as_unknown(sidecar)) < MOST_SECONDS
    (policies / "actions.yaml").write_text(GOOD)
    seconds_until(sidecar, lambda: not refused_as_unknown(sidecar))
    (policies / "more.yaml").write_text("actions: {quarantine: {risk: high}}\n")
    (policies / "actions.yaml").unlink()
    seconds_until(sidecar, lambda: refused_as_unknown(sidecar))
    before = status(sidecar)["config_revision"]
    configure(config, gate={"max_in_flight": 5})
    seconds_until(sidecar, lambda: status(sidecar)["config_revision"] != before)
    assert {line["cause"] for line in reloads(sidecar)} == {"files changed"}


@pytest.mark.slow
def test_the_swap_of_a_config_map_is_taken_up(tmp_path: Path, backend: Backend) -> None:
    config = write_configuration(tmp_path / "etc", backend.address)
    policies = config.parent / "policies"
    shutil.rmtree(policies)
    policies.mkdir()

    def version(number: int, text: str) -> None:
        """As the kubelet writes it: nothing that is read changes but one link."""
        folder = policies / f"..2026_{number}"
        folder.mkdir()
        (folder / "actions.yaml").write_text(text)
        os.utime(folder / "actions.yaml", ns=(0, 0))
        os.symlink(folder.name, policies / "..data_tmp")
        os.replace(policies / "..data_tmp", policies / "..data")
        if number:
            shutil.rmtree(policies / f"..2026_{number - 1}")

    version(0, GOOD)
    os.symlink("..data/actions.yaml", policies / "actions.yaml")

    def taken_up(sidecar: Program, refuses: bool) -> bool:
        return refused_as_unknown(sidecar) == refuses

    with Program(config) as sidecar:
        for number in range(1, 5):
            refuses = number % 2 == 1
            version(number, WITHOUT_RETRY if refuses else GOOD)
            seconds_until(sidecar, partial(taken_up, sidecar, refuses))
        assert {line["cause"] for line in reloads(sidecar)} == {"files changed"}
        assert len(reloads(sidecar)) == 4
        assert sidecar.stop() == 0


@pytest.mark.slow
def test_a_file_that_is_half_written_is_refused_and_taken_up_when_it_is_whole(
    sidecar: Program, config: Path
) -> None:
    file = config.parent / "policies" / "actions.yaml"
    half = len(WITHOUT_RETRY) - 4
    with file.open("w") as stream:
        stream.write(WITHOUT_RETRY[:half])
        stream.flush()
        seconds_until(sidecar, lambda: not status(sidecar)["last_reload"]["ok"])
        assert not refused_as_unknown(sidecar)
        (error,) = status(sidecar)["last_reload"]["errors"]
        assert error.startswith(f"{file}:")
        stream.write(WITHOUT_RETRY[half:])
    seconds_until(sidecar, lambda: refused_as_unknown(sidecar))
    assert status(sidecar)["last_reload"]["ok"]
    assert [line["level"] for line in reloads(sidecar)] == ["ERROR", "WARNING"]


@pytest.mark.slow
def test_the_beginning_of_a_file_is_not_taken_for_the_whole(sidecar: Program, config: Path) -> None:
    """Cut behind a line it could be used, and would allow what the rest refuses."""
    text = GOOD.replace("retry_agent", "later") + "rules:\n  - {id: none, on: issue, effect: deny}\n"
    text += "  - {id: more, on: execute, effect: deny}\n"
    with (config.parent / "policies" / "actions.yaml").open("w") as stream:
        for line in text.splitlines(keepends=True):
            stream.write(line)
            stream.flush()
            time.sleep(0.1)
    begun = time.monotonic()
    sidecar.until("takes up the change", lambda: changed(sidecar) or None, MOST_SECONDS)
    assert time.monotonic() - begun < MOST_SECONDS
    (line_,) = reloads(sidecar)
    assert (line_["actions"], line_["rules"], line_["old_actions"], line_["old_rules"]) == (2, 2, 2, 0)


def test_a_pipe_among_the_policies_refuses_the_reload_and_holds_up_nothing(
    sidecar: Program, config: Path
) -> None:
    pipe = config.parent / "policies" / "pipe.yaml"
    os.mkfifo(pipe)
    (error,) = reload(sidecar).json()["errors"]
    assert error == f"{pipe}: is not a regular file; remove it, or put one in its place"
    assert not refused_as_unknown(sidecar)
    checked = subprocess.run(
        [sys.executable, "-m", "sidecar", "check", "--config", str(config)],
        cwd=PROJECT,
        capture_output=True,
        timeout=ASK_SECONDS,
    )
    assert (checked.returncode, checked.stderr.decode().strip()) == (2, error)
    begun = time.monotonic()
    sidecar.signal(signal.SIGTERM)
    assert sidecar.wait() == 0
    assert time.monotonic() - begun < 4


def test_a_large_reload_does_not_outlast_the_end(config: Path) -> None:
    configure(config, shutdown={"drain_seconds": 0.5})
    with Program(config) as sidecar:
        text = " || ".join(f'intent.contains("{number}")' for number in range(60))
        for file in range(40):
            rules = "".join(
                f"  - {{id: r{file}-{number}, on: issue, when: '{text}', effect: deny}}\n"
                for number in range(300)
            )
            (config.parent / "policies" / f".{file}").write_text(f"rules:\n{rules}")
        for file in range(40):
            os.rename(config.parent / "policies" / f".{file}", config.parent / "policies" / f"r{file}.yaml")
        sidecar.signal(signal.SIGHUP)
        time.sleep(1)
        begun = time.monotonic()
        sidecar.signal(signal.SIGTERM)
        assert sidecar.wait() == 0
        assert time.monotonic() - begun < 4
        assert sidecar.log_lines()[-1]["message"] == "stopped"
        assert reloads(sidecar) == []


def test_nothing_is_reloaded_and_nothing_logged_where_nothing_changed(sidecar: Program, config: Path) -> None:
    before = status(sidecar)["last_reload"]
    policy(config, GOOD)
    os.utime(config)
    (config.parent / "policies" / "notes.txt").write_text("x")
    time.sleep(1.5)
    assert status(sidecar)["last_reload"] == before
    assert reloads(sidecar) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_watching_does_not_hold_up_the_end(sidecar: Program, number: signal.Signals) -> None:
    assert ask(sidecar.ops, "GET", "/health/ready").status == 200
    begun = time.monotonic()
    sidecar.signal(number)
    assert sidecar.wait() == 0
    assert time.monotonic() - begun < 4
    assert "Traceback" not in sidecar.log()

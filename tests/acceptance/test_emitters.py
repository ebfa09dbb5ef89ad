"""The emitters and the kill switch of the real program: durable, shared, and obeyed at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.acceptance.conftest import Program, ask, ask_json, scopegate

SWITCH = "/api/v1/care/kill-switch"


def choice(number: int) -> dict[str, Any]:
    return {
        "request_id": f"req_{number}",
        "baseline_agent": "a",
        "optimized_agent": "b",
        "confidence_score": 0.9,
        "signals_used": ["latency_p50"],
        "optimization_enabled": True,
        "shadow_mode": False,
    }


def emit(sidecar: Program, number: int) -> Any:
    """The record, or None where the answer is null."""
    answer = ask_json(sidecar.admin, "POST", "/api/v1/decisions/care_optimization", choice(number))
    assert answer.status in (200, 201), answer
    assert (answer.status == 201) == (answer.json() is not None)
    return answer.json()


def test_the_kill_switch_stops_emission_at_once_and_survives_a_kill(sidecar: Program) -> None:
    assert emit(sidecar, 1_000_001) is not None
    assert ask(sidecar.admin, "PUT", SWITCH).json() == {"active": True}
    assert emit(sidecar, 1_000_002) is None
    sidecar.kill()
    sidecar.start()
    assert ask(sidecar.admin, "GET", SWITCH).json() == {"active": True}
    assert emit(sidecar, 1_000_003) is None
    assert ask(sidecar.admin, "DELETE", SWITCH).json() == {"active": False}
    assert emit(sidecar, 1_000_002) is not None
    assert emit(sidecar, 1_000_001) is None  # of before the kill
    assert scopegate("log", "verify", "--config", sidecar.config).returncode == 0


def test_under_load_nothing_is_emitted_once_the_kill_switch_is_answered(sidecar: Program) -> None:
    ending = threading.Event()
    emitted: list[int] = []

    def load(first: int) -> None:
        number = first
        while not ending.is_set():
            if emit(sidecar, number) is not None:
                emitted.append(number)
            number += 4

    with ThreadPoolExecutor() as aside:
        clients = [aside.submit(load, first) for first in range(4)]
        try:
            sidecar.until("emits", lambda: len(emitted) > 40 or None)
            turned = ask(sidecar.admin, "PUT", SWITCH)
            assert turned.json() == {"active": True}
            (decision_id,) = turned.headers("scopegate-decision-id")
            after = ask(sidecar.admin, "GET", "/api/v1/decisions?type=care_routing_optimized&limit=1").json()
        finally:
            ending.set()
        for client in clients:
            client.result()
    switched = ask(sidecar.admin, "GET", f"/api/v1/decisions/{decision_id}").json()
    last = ask(sidecar.admin, "GET", "/api/v1/decisions?type=care_routing_optimized&limit=1").json()
    assert last["decisions"][0]["seq"] < switched["seq"]
    assert last["decisions"][0] == after["decisions"][0]
    assert ask(sidecar.admin, "DELETE", SWITCH).json() == {"active": False}

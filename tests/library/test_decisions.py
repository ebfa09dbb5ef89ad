"""The emitters of the library: what they leave in the store, once, under concurrency and over restarts."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from pydantic import ValidationError

from sidecar import decisions
from sidecar.core.command import Turn
from sidecar.decisions import (
    CARESignalAccessError,
    CausalRole,
    DecisionRecordService,
    DecisionType,
    activate_care_kill_switch,
    backfill_run_id_for_request,
    check_signal_access,
    configure,
    deactivate_care_kill_switch,
    emit_budget_decision,
    emit_budget_enforcement_decision,
    emit_care_optimization_decision,
    emit_memory_decision,
    emit_policy_decision,
    emit_policy_precheck_decision,
    emit_recovery_decision,
    emit_recovery_evaluation_decision,
    emit_routing_decision,
    get_decision_service,
    is_care_kill_switch_active,
)
from sidecar.library.runtime import ThreadedStore, configured_store, opened
from sidecar.store.verify import verify_sqlite
from tests.library.recorded import decided, envelopes, records, stored
from tests.support import eventually
from tests.unit.test_emission import CASES, UNSAID

pytestmark = pytest.mark.usefixtures("store_url")

# A call of each emitter that may leave only one record, and what asks whether it has.
ONCE: dict[str, tuple[Callable[[], object], Callable[[], bool]]] = {
    "budget_enforcement": (
        lambda: emit_budget_enforcement_decision("run", 500, 490, 20, 3, 7),
        lambda: decisions._check_budget_enforcement_exists("run"),
    ),
    "policy_precheck": (
        lambda: emit_policy_precheck_decision("r", "strict", False),
        lambda: decisions._check_policy_precheck_exists("r", "policy_blocked"),
    ),
    "recovery_evaluation": (
        lambda: emit_recovery_evaluation_decision("run", "r", "R1", "retry", "timeout"),
        lambda: decisions._check_recovery_evaluation_exists("run", "timeout"),
    ),
    "care_optimization": (
        lambda: emit_care_optimization_decision("r", "a1", "a2", 0.9, ["latency_p50"], True, False),
        lambda: decisions._check_care_optimization_exists("r"),
    ),
}
once = pytest.mark.parametrize(("emit", "exists"), ONCE.values(), ids=ONCE.keys())


def optimize(request_id: str = "r", confidence: float = 0.9, **changes: Any) -> object:
    arguments: dict[str, Any] = {
        "signals_used": ["latency_p50"],
        "optimization_enabled": True,
        "shadow_mode": False,
        **changes,
    }
    return emit_care_optimization_decision(request_id, "a1", "a2", confidence, **arguments)


# The table ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_an_emitter_returns_and_leaves_what_the_core_says(case: dict[str, Any]) -> None:
    emit = getattr(decisions, f"emit_{case['kind']}_decision")
    if "signal" in case:
        with pytest.raises(CARESignalAccessError) as refused:
            emit(**case["arguments"])
        assert refused.value.signal == case["signal"]
        assert stored() == []
        return
    record = emit(**case["arguments"])
    if case["record"] is None:
        assert record is None
        assert stored() == []
        return
    told = record.to_dict()
    (envelope,) = envelopes()
    assert envelope["record"] == told
    assert (envelope["origin"], envelope["event"]) == ("library", "emitted")
    assert UUID(told.pop("decision_id")).version == 7
    assert datetime.fromisoformat(told.pop("decided_at")) == record.decided_at
    assert abs(datetime.now(UTC) - record.decided_at) < timedelta(minutes=1)
    assert told == {**UNSAID, **case["record"]}


@pytest.mark.parametrize("kind", ["routing", "recovery", "memory", "policy", "budget"])
def test_an_ordinary_emitter_leaves_a_record_at_every_call(kind: str) -> None:
    case = next(each for each in CASES if each["kind"] == kind)
    for _ in range(3):
        assert getattr(decisions, f"emit_{kind}_decision")(**case["arguments"]) is not None
    assert len(records()) == 3


def test_ids_flags_and_numbers_of_other_types_count_as_what_they_mean() -> None:
    class No:
        def __bool__(self) -> bool:
            return False

    no: Any = No()
    run: Any = UUID(int=7)
    assert emit_policy_precheck_decision("r", "strict", no) is not None
    more: Any = Decimal("0.2")
    less: Any = Decimal("0.10")
    assert emit_budget_decision(run, more, less, "hard").decision_outcome == "blocked"
    told = records()[-1]
    assert told["run_id"] == str(run)
    assert told["decision_inputs"] == {"requested": "0.2", "available": "0.10", "enforcement": "hard"}


# Once ----------------------------------------------------------------------------------------------------


@once
def test_a_repeat_leaves_nothing_and_returns_none(
    emit: Callable[[], object], exists: Callable[[], bool]
) -> None:
    assert not exists()
    assert emit() is not None
    assert exists()
    assert emit() is None
    assert len(records()) == 1


@once
def test_of_200_threads_one_leaves_a_record(emit: Callable[[], object], exists: Callable[[], bool]) -> None:
    start = threading.Barrier(200)

    def at_once(_: int) -> object:
        start.wait(timeout=30)
        return emit()

    with ThreadPoolExecutor(200) as threads:
        answers = list(threads.map(at_once, range(200)))
    assert answers.count(None) == 199
    assert len(records()) == 1
    assert exists()


@once
async def test_of_200_tasks_one_leaves_a_record(
    emit: Callable[[], object], exists: Callable[[], bool]
) -> None:
    async def inside_the_loop() -> object:
        await asyncio.sleep(0)
        return emit()

    tasks = [inside_the_loop() if number % 2 else asyncio.to_thread(emit) for number in range(200)]
    answers = await asyncio.gather(*tasks)
    assert answers.count(None) == 199
    assert len(records()) == 1
    assert exists()


def test_failure_types_that_are_not_exactly_equal_are_recorded_each() -> None:
    different = ["a_b", "a%b", "axb", "A_B", "a_b ", "a\ud800b", "a\\ud800b"]
    for _ in range(2):
        for failure in different:
            emit_recovery_evaluation_decision("run", "r", "R3", None, failure)
    assert len(records()) == len(different)
    assert not decisions._check_recovery_evaluation_exists("run", "a__")


def test_each_outcome_of_a_precheck_is_recorded_once_for_its_request() -> None:
    assert emit_policy_precheck_decision("r", "strict", False) is not None
    assert emit_policy_precheck_decision("r", "strict", False, service_available=False) is not None
    assert emit_policy_precheck_decision("r", "strict", True, service_available=False) is None
    assert emit_policy_precheck_decision("r2", "strict", False) is not None
    assert [record["decision_outcome"] for record in records()] == [
        "policy_blocked",
        "policy_unavailable",
        "policy_blocked",
    ]


# Confidence, signals, the kill switch --------------------------------------------------------------------


def test_the_least_confidence_is_configured(store_url: str) -> None:
    assert optimize(confidence=0.49) is None
    configure(store_url, min_confidence=0.8)
    assert optimize(confidence=0.79) is None
    assert optimize(confidence=0.8) is not None


def test_a_signal_may_be_looked_at_or_it_raises() -> None:
    assert check_signal_access("success_rate") is True
    for signal in ("founder_overrides", "horoscope"):
        with pytest.raises(CARESignalAccessError) as refused:
            check_signal_access(signal)
        assert refused.value.signal == signal


def test_the_kill_switch_stops_optimization_at_once_and_nothing_else() -> None:
    assert is_care_kill_switch_active() is False
    assert activate_care_kill_switch() is True
    assert is_care_kill_switch_active() is True
    assert optimize() is None
    assert decisions._check_care_optimization_exists("r") is False
    assert emit_policy_decision("run", "p", True) is not None
    with pytest.raises(CARESignalAccessError):
        optimize(signals_used=["safety_events"])
    assert deactivate_care_kill_switch() is True
    assert is_care_kill_switch_active() is False
    assert optimize() is not None
    kinds = [(each["event"], each["record"]["decision_type"]) for each in envelopes()]
    assert kinds == [
        ("switched", "policy"),
        ("emitted", "policy"),
        ("switched", "policy"),
        ("emitted", "care_routing_optimized"),
    ]


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_the_kill_switch_and_what_is_kept_once_survive_closing_and_opening(store_url: str) -> None:
    assert optimize("before") is not None
    assert activate_care_kill_switch()
    configure()
    assert is_care_kill_switch_active() is False
    assert optimize("before") is not None
    configure(store_url)
    assert is_care_kill_switch_active() is True
    assert optimize("after") is None
    assert deactivate_care_kill_switch()
    assert optimize("before") is None
    assert optimize("after") is not None


def test_the_kill_switch_is_obeyed_by_a_call_that_is_under_way_already() -> None:
    """It is looked at in the transaction that would append."""

    async def both() -> tuple[object, object]:
        store = configured_store()
        turn = Turn(decision_id="d-1", switch="care_kill_switch", on=True, origin="library")
        return await asyncio.gather(store.submit(turn), asyncio.to_thread(optimize))

    assert asyncio.run(both())[1] is None


# Runs ----------------------------------------------------------------------------------------------------


def test_a_run_is_bound_to_the_pre_run_records_of_its_request_that_have_none() -> None:
    emit_routing_decision(None, True, "a", request_id="r")
    emit_budget_decision(None, 1, 2, request_id="r")
    emit_policy_precheck_decision("r", "strict", False)
    untouched = [
        emit_routing_decision("another", True, "a", request_id="r"),
        emit_memory_decision(None, True, request_id="r"),
        emit_routing_decision(None, True, "a", request_id="r", causal_role=CausalRole.POST_RUN),
        emit_routing_decision(None, True, "a", request_id="r2"),
        emit_routing_decision(None, True, "a"),
    ]
    before = [row.envelope for row in stored()]
    assert backfill_run_id_for_request("r", "run") == 3
    assert backfill_run_id_for_request("r", "run") == 0
    assert backfill_run_id_for_request("r", "later") == 0
    assert [row.bound_run_id for row in stored()] == ["run"] * 3 + [None] * 5
    assert [row.envelope for row in stored()] == before
    assert [record["decision_type"] for record in records(run_id="run")] == [
        "routing",
        "budget",
        "policy_pre_check",
    ]
    assert records(run_id="another") == [untouched[0].to_dict()]


@pytest.mark.parametrize(("request_id", "run_id"), [("", "run"), ("r", ""), ("", ""), (None, "run")])
def test_empty_ids_bind_nothing(request_id: Any, run_id: str) -> None:
    emit_routing_decision(None, True, "a", request_id=request_id)
    failures = get_decision_service().failures
    assert backfill_run_id_for_request(request_id, run_id) == 0
    assert [row.bound_run_id for row in stored()] == [None]
    assert get_decision_service().failures == failures


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_the_taxonomy_sees_what_policies_and_budgets_decided(database: Path) -> None:
    kept = [
        emit_policy_decision("run", "p", True, reason="fine"),
        emit_policy_decision("run", "p", True, True),
        emit_policy_precheck_decision("r", "strict", False),
        emit_budget_decision(None, 1, 2, request_id="r"),
        emit_budget_enforcement_decision("run", 5, 5, 1, 2, 3),
    ]
    emit_routing_decision(None, True, "a", request_id="r")
    emit_recovery_decision("run", True)
    backfill_run_id_for_request("r", "run")
    allowed = ["allowed", "denied", "denied", "allowed", "denied"]
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    try:
        cursor = connection.execute("SELECT * FROM policy_decisions ORDER BY created_at, id")
        rows = cursor.fetchall()
    finally:
        connection.close()
    columns = [column[0] for column in cursor.description]
    wanted = "id run_id policy_type decision rationale is_synthetic capture_confidence_score created_at"
    assert sorted(columns) == sorted(wanted.split())
    told = [dict(zip(columns, row, strict=True)) for row in rows]
    assert told == [
        {
            "id": record.decision_id,
            "run_id": "run",
            "policy_type": record.decision_type.value,
            "decision": decision,
            "rationale": record.decision_reason,
            "is_synthetic": 0,
            "capture_confidence_score": 1.0,
            "created_at": record.to_dict()["decided_at"],
        }
        for record, decision in zip(kept, allowed, strict=True)
        if record is not None
    ]


# Inside and outside loops, from threads and tasks --------------------------------------------------------


async def test_every_sync_function_works_inside_a_running_loop() -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    for emit, exists in ONCE.values():
        assert emit() is not None
        assert exists() is True
    assert emit_routing_decision(None, True, "a", request_id="r").decision_type is DecisionType.ROUTING
    assert emit_recovery_decision("run", True) is not None
    assert emit_memory_decision("run", True) is not None
    assert emit_policy_decision("run", "p", True) is not None
    assert emit_budget_decision("run", 1, 2) is not None
    assert get_decision_service().emit_sync(decided()) is True
    assert backfill_run_id_for_request("r", "run") == 3
    assert activate_care_kill_switch()
    assert is_care_kill_switch_active()
    assert deactivate_care_kill_switch()
    await asyncio.sleep(0)
    assert ticks > 0
    ticking.cancel()
    assert len(records()) == 12


def test_many_threads_and_loops_emit_at_once_and_every_record_is_kept(store_url: str, database: Path) -> None:
    service = DecisionRecordService(store_url)

    async def tasks(thread: int) -> list[bool]:
        return list(await asyncio.gather(*(service.emit(decided(run_id=f"{thread}-{n}")) for n in range(25))))

    def work(thread: int) -> list[bool]:
        if thread % 2:
            return asyncio.run(tasks(thread))
        return [service.emit_sync(decided(run_id=f"{thread}-{n}")) for n in range(25)]

    with ThreadPoolExecutor(8) as threads:
        answers = [answer for each in threads.map(work, range(8)) for answer in each]
    assert answers == [True] * 200
    assert {record["run_id"] for record in records()} == {f"{t}-{n}" for t in range(8) for n in range(25)}
    assert service.failures == 0
    if store_url.startswith("sqlite"):
        assert verify_sqlite(database).records == 200


@pytest.fixture(params=["open", "not open yet"])
def own(request: pytest.FixtureRequest, tmp_path: Path) -> ThreadedStore:
    """A store that nobody else uses; its first record opens it."""
    store = opened(f"sqlite:///{tmp_path / 'own.db'}")
    if request.param == "open":
        assert DecisionRecordService(store.url).emit_sync(decided(run_id="earlier"))
    return store


async def test_a_cancelled_caller_loses_no_record(own: ThreadedStore) -> None:
    service = DecisionRecordService(own.url)
    emitting = [asyncio.create_task(service.emit(decided(run_id=f"{n}"))) for n in range(20)]
    await asyncio.sleep(0)
    for each in emitting:
        each.cancel()
    ended = await asyncio.gather(*emitting, return_exceptions=True)
    assert [type(each) for each in ended] == [asyncio.CancelledError] * 20
    wanted = {f"{n}" for n in range(20)}
    await eventually(lambda: wanted <= {record["run_id"] for record in records(own)})
    assert service.failures == 0


async def test_a_loop_that_ends_at_once_loses_no_record(own: ThreadedStore) -> None:
    service = DecisionRecordService(own.url)

    async def main() -> None:
        emitting = asyncio.create_task(service.emit(decided(run_id="last")))
        await asyncio.sleep(0)
        assert not emitting.done()

    await asyncio.to_thread(asyncio.run, main())
    await eventually(lambda: "last" in [record["run_id"] for record in records(own)])


# The record ----------------------------------------------------------------------------------------------


async def test_a_record_is_stored_as_its_caller_made_it() -> None:
    record = decided(
        decision_inputs={"a": 1},
        decision_reason="because",
        run_id="run",
        workflow_id="flow",
        tenant_id="acme",
        request_id="r",
        causal_role=CausalRole.POST_RUN,
        decided_at=datetime(2020, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=2))),
        details={"b": None},
    )
    assert await get_decision_service().emit(record) is True
    assert records() == [record.to_dict()]
    assert record.to_dict()["decided_at"] == "2020-01-02T01:04:05.000000+00:00"


def test_a_record_has_the_defaults_of_the_contract() -> None:
    told = decided().to_dict()
    assert UUID(told.pop("decision_id"))
    assert abs(datetime.now(UTC) - datetime.fromisoformat(told.pop("decided_at"))) < timedelta(minutes=1)
    assert told == {
        **UNSAID,
        "decision_type": "routing",
        "decision_source": "human",
        "decision_trigger": "explicit",
        "decision_inputs": {},
        "decision_outcome": "selected",
        "causal_role": "in_run",
        "details": {},
    }
    assert decided().decision_id != decided().decision_id


@pytest.mark.parametrize(
    "fields",
    [
        {"decided_at": datetime.now(UTC).replace(tzinfo=None)},
        {"decided_at": datetime.max.replace(tzinfo=timezone(timedelta(hours=-1)))},
        {"decision_type": "rumour"},
        {"causal_role": None},
        {"details": ["a list"]},
        {"tenant_id": None},
        {"run": "run"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_is_no_record_is_refused_when_it_is_made(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        decided(**fields)


def test_a_record_does_not_change_once_it_is_made() -> None:
    given: dict[str, Any] = {"agents": ["a"]}
    record = decided(details=given)
    frozen: Any = record
    given["agents"].append("b")
    record.to_dict()["details"]["agents"].append("c")
    with pytest.raises(ValidationError):
        frozen.run_id = "run"
    assert get_decision_service().emit_sync(record)
    assert records()[0]["details"] == record.details == {"agents": ["a"]}


def test_anything_may_be_put_into_a_record() -> None:
    class Silent:
        def __str__(self) -> str:
            raise RuntimeError("no words")

    loop: dict[str, Any] = {"when": date(2026, 1, 1), "id": UUID(int=1), "bad": Silent()}
    loop["me"] = loop
    agent: Any = Silent()
    reason: Any = ValueError("a cause")
    context: Any = {1: Silent()}
    routed = emit_routing_decision(
        None,
        True,
        agent,
        eligible_agents=[{"b", "a"}, b"x", float("nan"), 2**70],
        details=loop,
        rejection_reason=reason,
        request_id="r\udfff",
    )
    evaluated = emit_recovery_evaluation_decision("run", "r", "R1", "retry", "timeout", context)
    assert evaluated is not None
    assert records() == [routed.to_dict(), evaluated.to_dict()]
    told = routed.to_dict()
    assert told["request_id"] == "r\\udfff"
    assert told["decision_inputs"]["eligible_agents"] == [["a", "b"], "x", "NaN", str(2**70)]
    assert told["details"] == {
        "when": "2026-01-01",
        "id": str(UUID(int=1)),
        "bad": "<unreadable>",
        "me": "<contains itself>",
    }


# The service ---------------------------------------------------------------------------------------------


def test_there_is_one_service_and_it_follows_what_is_configured(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        services = set(threads.map(lambda _: get_decision_service(), range(64)))
    (service,) = services
    assert service.emit_sync(decided(run_id="first"))
    configure(f"sqlite:///{tmp_path / 'second.db'}")
    assert service.emit_sync(decided(run_id="second"))
    assert [record["run_id"] for record in records()] == ["second"]


async def test_a_service_with_a_store_of_its_own_records_there(tmp_path: Path) -> None:
    own = tmp_path / "own.db"
    service = DecisionRecordService(f"sqlite:///{own}")
    assert await service.emit(decided())
    assert service.emit_sync(decided())
    assert records() == []
    assert verify_sqlite(own).records == 2
    configure(f"sqlite:///{own}")  # shares it, and closes it at the end of the test
    assert service.emit_sync(decided())
    assert len(records()) == 3


def test_a_service_for_what_is_no_store_is_an_error() -> None:
    with pytest.raises(ValueError, match="store_url"):
        DecisionRecordService("decisions.db")

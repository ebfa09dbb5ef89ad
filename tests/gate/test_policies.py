"""Rules and brakes over HTTP: what they refuse, what it says, what it leaves, also when many come at once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any

from sidecar.core.policy import Brake, Limit, Match, PolicySet, Require, Rule, Subject
from sidecar.errors import ConditionFailed
from tests.client import Message, connect, read_message, request_bytes
from tests.support import EXECUTE, POLICIES, House, Open, eventually, replies, sends

HOUR = 3600


def storm_brake(max_attempts: int) -> Rule:
    return Rule(
        id="storm-brake",
        on="execute",
        match=Match(action=("retry_*",)),
        brake=Brake(per=("incident_id", "action"), max_attempts=max_attempts, window_seconds=HOUR),
        reason="A restart that did not help will not help again.",
    )


FREEZE = Rule(id="freeze", on="execute", deny=True, reason="Nobody touches anything today.")


def with_rules(*rules: Rule) -> PolicySet:
    return replace(POLICIES, rules=rules)


async def scopes(house: House, count: int, **members: Any) -> list[dict[str, Any]]:
    return [await house.issue(max_attempts=10, max_cost_usd=100, **members) for _ in range((count + 9) // 10)]


async def at_once(house: House, granted: list[dict[str, Any]], count: int) -> list[Message]:
    return await asyncio.gather(*(house.execute(granted[each % len(granted)]) for each in range(count)))


def refused(answer: Message) -> dict[str, Any]:
    body: dict[str, Any] = answer.json()
    return body


# Brakes -------------------------------------------------------------------------------------------------


async def test_of_200_concurrent_executions_a_brake_of_5_lets_5_through_and_not_one_more_after_a_restart(
    open_house: Open, house: House
) -> None:
    house.adopt(with_rules(storm_brake(5)))
    granted = await scopes(house, 200)
    answers = await at_once(house, granted, 200)
    assert sorted({answer.status for answer in answers}) == [200, 429]
    assert [answer.status for answer in answers].count(200) == 5
    assert len(house.backend.executions) == 5
    used = sum([scope["attempts_used"] for scope in (await house.scopes(query="?limit=1000"))["scopes"]])
    assert used == 5  # a refusal consumes nothing
    await house.sidecar.stop()

    again = await open_house(policies=with_rules(storm_brake(5)))
    answers = await at_once(again, granted, 200)
    assert {answer.status for answer in answers} == {429}
    again.clock.move(HOUR)
    renewed = await scopes(again, 200)
    answers = await at_once(again, renewed, 200)
    assert [answer.status for answer in answers].count(200) == 5
    assert len(again.backend.executions) == 10


async def test_a_brake_says_its_rule_why_and_to_the_second_when_to_come_back(house: House) -> None:
    house.adopt(with_rules(storm_brake(1)))
    (scope,) = await scopes(house, 1)
    assert (await house.execute(scope)).status == 200
    answer = await house.execute(scope)
    body = refused(answer)
    assert (answer.status, body["error"], body["rules"]) == (429, "braked", ["storm-brake"])
    assert "will not help again" in body["message"]
    seconds = int(answer.header("Retry-After") or 0)
    assert body["retry_after_seconds"] == seconds
    assert HOUR - 3 <= seconds <= HOUR
    record = await house.record(body["decision_id"])
    assert (record["event"], record["decision_outcome"], record["decision_reason"]) == (
        "refused",
        "policy_blocked",
        "braked",
    )
    assert record["details"]["rules"] == ["storm-brake"]
    assert record["details"]["ends_at"] == body["ends_at"]

    house.clock.move(seconds - 2)
    (renewed,) = await scopes(house, 1)
    assert (await house.execute(renewed)).status == 429
    house.clock.move(2)
    assert (await house.execute(renewed)).status == 200


async def test_a_brake_holds_for_its_own_seconds_though_the_wall_clock_was_set_back(house: House) -> None:
    house.adopt(with_rules(Rule(id="cool", on="execute", brake=Brake(cooldown_seconds=5))))
    (scope,) = await scopes(house, 1)
    assert (await house.execute(scope)).status == 200
    house.clock.set(-50)
    seconds = int((await house.execute(scope)).header("Retry-After") or 0)
    assert 1 <= seconds <= 5
    house.clock.move(seconds)
    assert (await house.execute(scope)).status == 200


async def test_another_incident_and_an_action_that_the_rule_does_not_name_are_not_braked(
    house: House,
) -> None:
    house.adopt(with_rules(storm_brake(1)))
    (scope,) = await scopes(house, 1)
    (elsewhere,) = await scopes(house, 1, incident_id="inc_2")
    (other,) = await scopes(house, 1, action="failover")
    statuses = [(await house.execute(each)).status for each in (scope, scope, elsewhere, other, other)]
    assert statuses == [200, 429, 200, 200, 200]


async def test_one_in_flight_holds_until_the_first_has_ended(house: House) -> None:
    one = Rule(id="one", on="execute", brake=Brake(window_seconds=HOUR, one_in_flight=True))
    house.adopt(with_rules(one))
    released = asyncio.Event()
    house.backend.script = replies(after=released)
    (scope,) = await scopes(house, 1)
    first = asyncio.ensure_future(house.execute(scope))
    await house.backend.arrived.wait()
    braked = await house.execute(scope)
    assert (braked.status, braked.header("Retry-After")) == (429, "1")
    assert refused(braked)["ends_at"] is None
    released.set()
    assert (await first).status == 200
    assert (await house.execute(scope)).status == 200


async def test_an_unknown_execution_holds_one_in_flight_until_it_is_reconciled(house: House) -> None:
    one = Rule(id="one", on="execute", brake=Brake(window_seconds=HOUR, one_in_flight=True))
    house.adopt(with_rules(one))
    house.backend.script = sends(then="reset")
    (scope,) = await scopes(house, 1)
    lost = await house.execute(scope)
    assert refused(lost)["error"] == "upstream_failed"
    house.backend.script = replies()
    braked = await house.execute(scope)
    assert braked.status == 429
    assert HOUR - 3 <= int(braked.header("Retry-After") or 0) <= HOUR
    decision = lost.header("Scopegate-Decision-Id")
    reconciled = await house.admin(
        "POST", f"/api/v1/executions/{decision}/reconcile", {"outcome": "executed", "reason": "seen"}
    )
    assert reconciled.status == 200
    assert (await house.execute(scope)).status == 200


async def test_what_was_provably_not_sent_does_not_count(open_house: Open, backend: Any) -> None:
    once = Rule(id="once", on="execute", brake=Brake(max_attempts=1, window_seconds=HOUR))
    house = await open_house(policies=with_rules(once), upstream_port=1)
    (scope,) = await scopes(house, 1)
    for _ in range(3):
        assert refused(await house.execute(scope))["error"] == "upstream_unreachable"


# Rules --------------------------------------------------------------------------------------------------


async def test_a_rule_that_denies_is_named_with_its_reason_and_consumes_nothing(house: House) -> None:
    scope = await house.issue()
    house.adopt(with_rules(FREEZE))
    answer = await house.execute(scope)
    body = refused(answer)
    assert (answer.status, body["error"], body["rules"]) == (403, "policy_denied", ["freeze"])
    assert "Nobody touches anything today." in body["message"]
    assert (await house.scope(scope))["attempts_used"] == 0
    record = await house.record(body["decision_id"])
    assert (record["decision_outcome"], record["details"]["rules"]) == ("policy_blocked", ["freeze"])
    assert house.backend.executions == []


async def test_a_scopes_own_bound_is_named_before_any_rule(house: House) -> None:
    scope = await house.issue()
    assert (await house.execute(scope)).status == 200
    house.adopt(with_rules(FREEZE))
    assert refused(await house.execute(scope))["error"] == "scope_exhausted"


async def test_a_default_above_a_limit_is_lowered_and_a_wish_above_it_is_refused(house: House) -> None:
    short = Rule(id="short", on="issue", limit=Limit(ttl_seconds=1, max_cost=250_000))
    house.adopt(with_rules(short))
    granted = await house.issue()
    assert granted["max_cost_usd"] == 0.25
    (record,) = await house.records("&event=issued")
    assert record["details"]["rules"] == ["short"]
    assert record["details"]["ttl_seconds"] == 1
    house.clock.move(1)
    assert refused(await house.execute(granted))["error"] == "scope_expired"
    answer = await house.ask_for_scope(ttl_seconds=60)
    body = refused(answer)
    assert (answer.status, body["error"], body["rules"]) == (403, "policy_denied", ["short"])
    assert (body["limit"], body["value"]) == ("ttl_seconds", 1)
    refusal = await house.record(body["decision_id"])
    assert (refusal["details"]["limit"], refusal["details"]["value"]) == ("ttl_seconds", 1)


async def test_what_a_rule_requires_is_asked_of_grants(house: House) -> None:
    wanting = Rule(id="say-why", on="issue", require=Require(intent_min_chars=10, target_agents=True))
    house.adopt(with_rules(wanting))
    assert refused(await house.ask_for_scope(intent="too short"))["rules"] == ["say-why"]
    assert refused(await house.ask_for_scope(intent="long enough"))["error"] == "policy_denied"
    assert (await house.ask_for_scope(intent="long enough", target_agents=["a"])).status == 201


@dataclass(frozen=True)
class Broken:
    """A condition that never comes to an end of its own."""

    text: str = "1 / 0 == 1"
    reads: frozenset[str] = frozenset()

    def __call__(self, subject: Subject) -> bool:
        raise ConditionFailed("division by zero")


async def test_a_condition_that_fails_refuses_is_recorded_and_counted(house: House) -> None:
    scope = await house.issue()
    house.adopt(with_rules(replace(FREEZE, when=Broken())))
    answer = await house.execute(scope)
    body = refused(answer)
    assert (answer.status, body["rules"], body["condition_error"]) == (403, ["freeze"], "division by zero")
    assert (await house.record(body["decision_id"]))["details"]["condition_error"] == "division by zero"
    assert await house.metric('scopegate_condition_errors_total{rule="freeze"}') == 1


async def test_each_condition_that_fails_is_counted_whatever_else_refuses(house: House) -> None:
    scope = await house.issue()
    house.adopt(with_rules(FREEZE, replace(FREEZE, id="z-broken", when=Broken())))
    assert refused(await house.execute(scope))["rules"] == ["freeze", "z-broken"]
    assert await house.metric('scopegate_condition_errors_total{rule="z-broken"}') == 1
    assert await house.metric('scopegate_condition_errors_total{rule="freeze"}') == 0


async def test_a_rule_in_shadow_lets_through_records_and_counts(house: House) -> None:
    scope = await house.issue()
    house.adopt(with_rules(replace(FREEZE, shadow=True)))
    answer = await house.execute(scope)
    assert answer.status == 200
    record = await house.record(answer.header("Scopegate-Decision-Id") or "")
    (would,) = record["details"]["would_refuse"]
    assert (would["rule"], would["error"]) == ("freeze", "policy_denied")
    assert record["details"]["rules"] == []
    assert await house.metric('scopegate_shadow_refusals_total{reason="policy_denied",rule="freeze"}') == 1


async def test_a_request_keeps_the_policies_that_it_began_with(house: House) -> None:
    """The body comes late; in between the policies change."""
    scope = await house.issue()
    _, body = house.execution(scope)
    reader, writer = await connect(house.sidecar.data_address)
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    writer.write(request_bytes("POST", EXECUTE, headers, b""))
    await writer.drain()
    await asyncio.sleep(0.05)
    house.adopt(replace(with_rules(FREEZE), revision="rev-2"))
    writer.write(body)
    answer = await read_message(reader)
    writer.close()
    assert answer is not None
    assert answer.status == 200
    record = await house.record(answer.header("Scopegate-Decision-Id") or "")
    assert record["details"]["policy_revision"] == "rev-1"


# Explain ------------------------------------------------------------------------------------------------


async def test_explain_says_which_rule_which_bound_what_is_left_and_what_to_do(house: House) -> None:
    house.adopt(with_rules(storm_brake(2)))
    (scope,) = await scopes(house, 1)
    await house.execute(scope)
    told = await house.explain(scope)
    assert told["allowed"] is True
    assert told["left"]["attempts"] == 9
    assert told["left"]["cost_usd"] == 100
    assert 290 < told["left"]["seconds"] <= 300
    (brake,) = told["brakes"]
    assert (brake["rule"], brake["used"], brake["max_attempts"], brake["holds"]) == (
        "storm-brake",
        1,
        2,
        False,
    )
    assert brake["per"] == {"incident_id": "inc_1", "action": "retry_agent"}

    await house.execute(scope)
    told = await house.explain(scope)
    assert (told["allowed"], told["error"], told["rules"]) == (False, "braked", ["storm-brake"])
    assert told["brakes"][0]["holds"] is True
    assert told["brakes"][0]["ends_at"] == told["members"]["ends_at"]
    assert "Wait" in told["next"]
    assert (await house.scope(scope))["attempts_used"] == 2  # looking is free


async def test_explain_counts_all_that_a_brake_has_seen(house: House) -> None:
    house.adopt(with_rules(storm_brake(9)))
    (scope,) = await scopes(house, 1)
    for used in range(5):
        (brake,) = (await house.explain(scope))["brakes"]
        assert brake["used"] == used
        assert (await house.execute(scope)).status == 200


async def test_explain_agrees_with_execute_on_every_refusal_by_a_rule(house: House) -> None:
    (scope,) = await scopes(house, 1)
    for rules in (
        (FREEZE,),
        (replace(FREEZE, when=Broken()),),
        (replace(FREEZE, match=Match(action=("x",))),),
    ):
        house.adopt(with_rules(*rules))
        told = await house.explain(scope)
        answer = await house.execute(scope)
        assert told["allowed"] == (answer.status == 200)
        if answer.status != 200:
            assert told["message"] == refused(answer)["message"]
            assert told["rules"] == refused(answer)["rules"]


async def test_a_flood_against_a_brake_is_summed_up_and_not_one_gets_through(house: House) -> None:
    house.adopt(with_rules(storm_brake(1)))
    (scope,) = await scopes(house, 1)
    assert (await house.execute(scope)).status == 200
    for _ in range(6):
        answers = await at_once(house, [scope], 200)
        assert {answer.status for answer in answers} == {429}
        assert all(answer.header("Retry-After") for answer in answers)
    assert len(house.backend.executions) == 1

    async def told() -> bool:
        counted = [each["details"].get("count", 1) for each in await house.records("&event=refused")]
        return bool(sum(counted) == 1200)

    await eventually(told)

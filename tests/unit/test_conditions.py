"""A rule's `when`: what it may read, what it comes to, and that every way to fail refuses in our words."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from cel_expr_python import cel
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sidecar.core.policy import FACTS, RiskClass, Subject
from sidecar.core.rules import preview
from sidecar.errors import ConditionFailed
from sidecar.files.faults import ConfigurationError
from sidecar.policies import _conditions as conditions
from sidecar.policies import _plain
from sidecar.policies._conditions import MAX_CHARS, MAX_VALUE_CHARS, MAX_VALUES, condition, joint
from sidecar.policies.files import load
from sidecar.settings.faults import WrongText

CHRISTMAS_EVE = 1_798_070_400_000_000  # 2026-12-24T00:00:00Z


def subject(**facts: Any) -> Subject:
    known: dict[str, Any] = {
        "action": "restart_pod",
        "risk": RiskClass.HIGH,
        "incident_id": "inc-7",
        "tenant_id": "team-a",
        "principal": "bot",
        "target_agents": ("a-1", "a-2"),
        "parameters": {"namespace": "prod", "replicas": 3},
        "intent": "free the queue",
        "max_cost": 2_500_000,
        "attempts_used": 1,
        "attempts_remaining": 2,
        "scope_age_seconds": 90,
        "now": CHRISTMAS_EVE,
    }
    return Subject(**{**known, **facts})


def holds(text: str, **facts: Any) -> bool:
    return condition(text)(subject(**facts))


def failure(text: str, **facts: Any) -> str:
    with pytest.raises(ConditionFailed) as caught:
        holds(text, **facts)
    return str(caught.value)


def mistake(text: str) -> tuple[str, tuple[int, int] | None]:
    with pytest.raises(WrongText) as caught:
        condition(text)
    return str(caught.value), caught.value.position


# What it reads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fact", "equal", "other"),
    [
        ("action", '"restart_pod"', '"restart"'),
        ("risk", '"high"', '"HIGH"'),
        ("incident_id", '"inc-7"', '"inc-8"'),
        ("tenant_id", '"team-a"', '"team-b"'),
        ("principal", '"bot"', '""'),
        ("target_agents", '["a-1", "a-2"]', '["a-2", "a-1"]'),
        ("parameters", '{"namespace": "prod", "replicas": 3}', '{"namespace": "prod"}'),
        ("intent", '"free the queue"', '"free"'),
        ("max_cost_micros", "2500000", "2500001"),
        ("attempts_used", "1", "0"),
        ("attempts_remaining", "2", "3"),
        ("scope_age_seconds", "90", "91"),
        ("now", 'timestamp("2026-12-24T00:00:00Z")', 'timestamp("2026-12-24T00:00:01Z")'),
    ],
)
def test_every_fact_can_be_read(fact: str, equal: str, other: str) -> None:
    assert condition(f"{fact} == {equal}").reads == {fact}
    assert holds(f"{fact} == {equal}")
    assert not holds(f"{fact} == {other}")


def test_the_facts_above_are_all() -> None:
    assert condition(" && ".join(f"{fact} == {fact}" for fact in FACTS)).reads == set(FACTS)


def test_now_is_exact_to_the_microsecond() -> None:
    text = 'now == timestamp("2026-12-24T00:00:00.000001Z")'
    assert not holds(text)
    assert holds(text, now=CHRISTMAS_EVE + 1)


def test_an_action_without_a_risk_has_an_empty_one() -> None:
    assert holds('risk == ""', risk=None)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Decimal("0.5"), "parameters.v == 0.5"),
        ({"deep": [Decimal("1E+2"), {"er": Decimal("-0.25")}]}, "parameters.v.deep[1].er == -0.25"),
        (2**63 - 1, "parameters.v == 9223372036854775807"),
        (True, "parameters.v"),
        (None, "parameters.v == null"),
        ("t\u00e9xt \U0001f600", 'parameters.v == "t\u00e9xt \U0001f600"'),
        ([1, "a", None], 'parameters.v == [1, "a", null]'),
        ((1, 2), "parameters.v == [1, 2]"),
        ({}, "parameters.v.size() == 0"),
    ],
)
def test_parameters_are_read_as_json_has_them(value: object, text: str) -> None:
    assert holds(text, parameters={"v": value})


@pytest.mark.parametrize(
    ("text", "reads"),
    [
        ("true", set()),
        ('"risk" == "action"', set()),
        ("'intent' == \"it's intent\"", set()),
        ('r"\\intent" == action', {"action"}),
        ('"a\\"intent" == action', {"action"}),
        ('"""intent " intent""" == action', {"action"}),
        ("action == '''a\n'b' intent\\''''", {"action"}),
        ('action == "a" // don\'t read the intent', {"action"}),
        ('action == "//" && risk == "a"', {"action", "risk"}),
        ("b'intent' == b\"a\" || bR'\\d' == b'risk' || risk == 'a'", {"risk"}),
        ('.risk == "a"', {"risk"}),
    ],
)
def test_a_fact_is_read_where_its_name_stands_outside_of_text(text: str, reads: set[str]) -> None:
    found = condition(text)
    assert found.reads == reads
    found(subject())


def test_a_condition_on_the_scope_is_known_as_one() -> None:
    assert condition("attempts_used > 0").reads == {"attempts_used"}
    assert condition("attempts_used > 0") == condition("attempts_used > 0")
    assert condition("attempts_used > 0") != condition("attempts_used > 1")


# What it comes to ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "parameters.gone == 1",
            "it reads a member that is not there (gone); ask for it with has(...) first.",
        ),
        (
            "parameters[parameters.namespace] == 1",
            "it reads a member that is not there; ask for it with has(...) first.",
        ),
        ('target_agents[2] == "a"', "it reads an item behind the end of a list; ask for its size() first."),
        ("1 / (attempts_used - 1) == 1", "it divides by zero."),
        ("1 % (attempts_used - 1) == 1", "it divides by zero."),
        ("attempts_used + 9223372036854775807 > 0", "a number in it leaves 64 bits."),
        (
            "parameters.namespace < 5",
            "it compares or combines values of kinds that do not go together.",
        ),
        ("parameters.replicas", "it is neither true nor false."),
        ("dyn(1)", "it is neither true nor false."),
        (
            "timestamp(parameters.namespace) < now",
            "it reads a text as a time or a duration that is none.",
        ),
        ("duration(risk) < now - now", "it reads a text as a time or a duration that is none."),
    ],
)
def test_what_cannot_be_judged_fails_and_says_why(text: str, said: str) -> None:
    assert failure(text) == said


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({"parameters": {"v": 2**200}}, "parameters.v == 1"),
        ({"max_cost": 2**63}, "max_cost_micros > 0"),
        ({"intent": "\ud800"}, 'intent == "a"'),
        ({"parameters": {"v": "\udfff"}}, 'parameters.v == "a"'),
        ({"parameters": {"v": object()}}, "parameters.v == 1"),
        ({"parameters": {"v": {1: 2}}}, "parameters.v == 1"),
        ({"parameters": {"v": Decimal("sNaN")}}, "parameters.v == 1.0"),
        ({"now": 2**62}, "now == now"),
    ],
)
def test_a_value_that_the_engine_cannot_hold_fails(facts: dict[str, Any], text: str) -> None:
    said = failure(text, **facts)
    assert said.endswith(".")
    # What a client sent may be a secret.
    assert "184467" not in said
    assert "9223" not in said


def test_a_failure_does_not_repeat_what_a_client_sent() -> None:
    assert "hunter2" not in failure("parameters[parameters.v] == 1", parameters={"v": "hunter2"})
    assert "hunter2" not in failure("timestamp(parameters.v) < now", parameters={"v": "hunter2"})
    assert "hunter2" not in failure("parameters.v < 1", parameters={"v": "hunter2"})


def test_a_failure_beside_what_decides_alone_is_none() -> None:
    assert holds('risk == "high" || parameters.gone')
    assert not holds('risk == "low" && parameters.gone')
    assert not holds("has(parameters.gone) && parameters.gone == 1")


# What it costs -------------------------------------------------------------------------------------------


def test_a_condition_of_too_many_steps_is_stopped() -> None:
    text = 'target_agents.all(a, target_agents.all(b, a != "x" || b != "y"))'
    assert holds(text, target_agents=tuple(f"a-{number}" for number in range(90)))
    said = failure(text, target_agents=tuple(f"a-{number}" for number in range(256)))
    assert said == "it takes more than 10,000 steps; loop over fewer values."


def nested(depth: int) -> list[Any]:
    return [nested(depth - 1)] if depth > 1 else []


@pytest.mark.parametrize(
    ("most", "more"),
    [
        ([0] * (MAX_VALUES - 1), [0] * MAX_VALUES),
        ([[[0] * 62], [0] * 62], [[[0] * 63], [0] * 62]),
        (
            {str(number): 0 for number in range(MAX_VALUES - 1)},
            {str(number): 0 for number in range(MAX_VALUES)},
        ),
        (nested(MAX_VALUES), nested(MAX_VALUES + 1)),
    ],
)
def test_the_values_that_a_condition_reads_are_bounded_at_all_depths(most: object, more: object) -> None:
    assert holds("parameters.v == parameters.v", parameters={"v": most})
    said = failure("parameters.v == parameters.v", parameters={"v": more})
    assert said == f"it reads parameters that hold more than {MAX_VALUES} values."


@pytest.mark.parametrize(
    ("most", "more"),
    [
        ("x" * (MAX_VALUE_CHARS - 1), "x" * MAX_VALUE_CHARS),
        (["x" * 2000, {"k" * 2000: "y" * 95}], ["x" * 2000, {"k" * 2000: "y" * 96}]),
    ],
)
def test_the_characters_that_a_condition_reads_are_bounded(most: object, more: object) -> None:
    assert holds("parameters.v == parameters.v", parameters={"v": most})
    said = failure("parameters.v == parameters.v", parameters={"v": more})
    assert said == f"it reads parameters of more than {MAX_VALUE_CHARS} characters."


@pytest.mark.parametrize(
    "text",
    [
        'parameters.namespace == "prod"',
        "has(parameters.namespace) && !has(parameters.gone)",
        'parameters . namespace == "prod" && parameters.replicas == 3',
        'risk == "high"',
    ],
)
def test_parameters_that_a_condition_does_not_read_do_not_count(text: str) -> None:
    assert holds(text, parameters={"namespace": "prod", "replicas": 3, "manifest": ["x" * 9000] * 300})


@pytest.mark.parametrize(
    "text",
    [
        'parameters["namespace"] == "prod"',
        "parameters.all(name, true)",
        "parameters.size() > 0",
        '[parameters].all(one, one.namespace == "prod")',
        'parameters.namespace == "prod" && "namespace" in parameters',
    ],
)
def test_a_condition_that_may_read_any_of_the_parameters_is_bounded_by_all(text: str) -> None:
    assert holds(text)
    said = failure(text, parameters={"namespace": "prod", "manifest": [0] * MAX_VALUES})
    assert said == f"it reads parameters that hold more than {MAX_VALUES} values."


# Mistakes in the text ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said", "position"),
    [
        ('rsk == "low"', 'rsk is no fact; did you mean "risk"?', (1, 1)),
        ('risk == "low" &&\n  rsk == "a"', 'rsk is no fact; did you mean "risk"?', (2, 3)),
        ('"\u00e9\U0001f600" == rsk', 'rsk is no fact; did you mean "risk"?', (1, 9)),
        ("risk == low", 'low is no fact; write "low" in quotes', (1, 9)),
        ("risk == zzz", f"zzz is no fact; the facts are {', '.join(FACTS)}; put text in quotes", (1, 9)),
        (r"r'\' == risk", "is no text that CEL reads; write each backslash twice", (1, 1)),
        ("risk.sise() == 1", 'sise(...) is no function of conditions; did you mean "size"?', (1, 6)),
        ("risk.size(1) == 1", "size(...) does not take this; compare CEL's description of it", (1, 6)),
        (
            "risk + 1 == 2",
            "+ does not work on (string, int); use values of kinds that go together",
            (1, 6),
        ),
        (
            "now > '2026'",
            "> does not work on (timestamp, string); use values of kinds that go together",
            (1, 5),
        ),
        (
            'risk == "low" && risk.level == 1',
            "a value of the type string has no members; remove the name behind the dot",
            (1, 22),
        ),
        ("risk ==", "ends too early; complete it, and close its brackets and quotes", (1, 8)),
        ("(risk ==\n", "ends too early; complete it, and close its brackets and quotes", (1, 9)),
        ('risk == "low', "the quoted text that begins here is never closed; add the quote", (1, 9)),
        ('risk = "low"', "= is no comparison; write == for equal", (1, 6)),
        (
            'risk == "low" and true',
            "and is no operator of conditions; write && for and, || for or, ! for not",
            (1, 15),
        ),
        (
            "not true",
            "not is no operator of conditions; write && for and, || for or, ! for not",
            (1, 5),
        ),
        (
            "not (risk == 'low') || true",
            "not is no operator of conditions; write && for and, || for or, ! for not",
            (1, 1),
        ),
        (
            "risk == 'low' and (true)",
            "and is no operator of conditions; write && for and, || for or, ! for not",
            (1, 15),
        ),
        (
            "risk == @",
            "cannot be read from here on; check the brackets, quotes and operators before it",
            (1, 9),
        ),
        ("has(risk)", "has(...) takes one member, such as has(parameters.name)", (1, 5)),
        ("risk == if", "is a reserved word of CEL; use another name", (1, 9)),
        (
            "attempts_used == 9223372036854775808",
            "is no number of at most 64 bits; write a smaller one",
            (1, 18),
        ),
        ("parameters.?x == 1", "cannot be used (unsupported syntax '.?')", (1, 1)),
        ("risk", "must come to true or false, not to string; compare it with something", None),
        ("[true]", "must come to true or false, not to list<bool>; compare it with something", None),
        ("", "is empty; write a condition, or remove the key", None),
        (" \n ", "is empty; write a condition, or remove the key", None),
        (
            "(" * 40 + "true" + ")" * 40,
            "is nested too deeply; write several rules, or combine fewer values",
            None,
        ),
        (
            "true" + " " * (MAX_CHARS - 3),
            f"has over {MAX_CHARS} characters; make it shorter, or write several rules",
            None,
        ),
    ],
)
def test_a_mistake_is_named_at_its_place(text: str, said: str, position: tuple[int, int] | None) -> None:
    assert mistake(text) == (said, position)


@pytest.mark.parametrize(
    "text",
    [
        "2026-12-24",
        "2026-12-24T00:00:00",
        "2026-12-24 00:00:00Z",
        "2026-13-24T00:00:00Z",
        "2026-02-30T00:00:00Z",
        "tomorrow",
        "",
    ],
)
def test_a_time_that_is_none_is_found_when_it_is_read(text: str) -> None:
    said = "timestamp(...) takes a time in RFC 3339 with Z or an offset, such as "
    said += 'timestamp("2026-12-24T00:00:00Z")'
    assert mistake(f'risk == "low" &&\n  now >= timestamp( // from\n "{text}" )') == (said, (2, 10))


@pytest.mark.parametrize("text", ["1d", "5 m", "36", "h", "99999999999999h", ""])
def test_a_duration_that_is_none_is_found_when_it_is_read(text: str) -> None:
    said = 'duration(...) takes hours, minutes and seconds, such as duration("36h")'
    assert mistake(f"now - now < duration('{text}')") == (said, (1, 13))


@pytest.mark.parametrize(
    "text",
    [
        'now >= timestamp("2026-12-24T00:00:00Z")',
        "now >= timestamp (r'2026-12-24T00:59:59.5+01:00')",
        'now - timestamp("2026-12-23T00:00:00Z") < duration("36h") && duration("1h30m") > duration("-1.5h")',
        "\"timestamp('x')\" != risk // duration('x')",
    ],
)
def test_a_time_and_a_duration_are_read(text: str) -> None:
    assert holds(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('now >= timestamp(("2026-13-01T00:00:00Z"))', "timestamp"),
        ('now >= timestamp("2026-13" + "-01T00:00:00Z")', "timestamp"),
        ('now >= timestamp(true ? "x" : "y")', "timestamp"),
        ("now >= timestamp(99999999999999)", "timestamp"),
        ('now >= timestamp // from\n ("x")', "timestamp"),
        ('[1].all(x, now - now < duration(["1d"][0]))', "duration"),
        ('attempts_used < int("1O")', "int"),
        ('0u < uint("-1")', "uint"),
        ("attempts_used < int(1e300)", "int"),
        ("now < timestamp(0xffffffffffff)", "timestamp"),
        ('0.5 < double("half")', "double"),
        ('bool("yes")', "bool"),
    ],
)
def test_every_value_of_constants_is_tried(text: str, name: str) -> None:
    said, position = mistake(text)
    assert said.startswith(f"{name}(...) takes ")
    before = text[: text.index(f"{name}")]
    assert position == (1, len(before) + 1)


# Time zones -----------------------------------------------------------------------------------------------

IN_A_ZONE = (
    *("getFullYear", "getMonth", "getDate", "getDayOfMonth", "getDayOfWeek", "getDayOfYear", "getHours"),
    *("getMinutes", "getSeconds", "getMilliseconds"),
)


@pytest.mark.parametrize("name", IN_A_ZONE)
def test_a_zone_that_does_not_exist_is_found_when_it_is_read(name: str) -> None:
    said, position = mistake(f"risk == 'low' &&\n  now.{name}('Europe/Berln') < 8")
    assert said.startswith(f"{name}(...) ")
    assert position == (2, 7)


@pytest.mark.parametrize(
    "call",
    [
        "now.getHours('Europe/Berln')",
        "now.getHours(r'Europe/Berln')",
        "now.getHours('Europe/' + 'Berln')",
        "now.getHours(('Europe/Berln'))",
        "now . getHours ( 'Europe/Berln' )",
        "now.getHours // here\n ('Europe/Berln')",
        "now.getHours('Europe/Berln' // there\n)",
        "timestamp('2026-01-01T00:00:00Z').getHours('Europe/Berln')",
        "(risk == 'low' ? now : now).getHours('Europe/Berln')",
        "(has(parameters.x) ? now.getHours('Europe/Berln') : 1)",
        "[1].map(x, now.getHours('Europe/Berln'))[0]",
        "now.getHours('utc')",
        "now.getHours('Z')",
        "now.getHours(' ')",
        "now.getHours('/etc/passwd')",
        "now.getHours('+24:00')",
        "now.getHours('-99:00')",
        "now.getHours('08:60')",
        "now.getHours('+8:-30')",
        "now.getHours('\\x2b25:00')",
        "now.getHours(risk == 'low' ? 'UTC' : 'Europe/Berln')",
        "now.getHours(risk)",
        "now.getHours(parameters.zone)",
        "now.getHours(string(parameters.zone))",
    ],
)
def test_a_zone_is_a_constant_and_one_that_exists(call: str) -> None:
    said, position = mistake(f"{call} < 8")
    assert said.startswith("getHours(...) ")
    assert position == (1, call.index("getHours") + 1)


@pytest.mark.parametrize(
    ("call", "hour"),
    [
        ("now.getHours()", 6),
        ("now.getHours( // UTC\n )", 6),
        ("now.getHours('UTC')", 6),
        ("now.getHours('')", 6),
        ("now.getHours('-08:00')", 22),
        ("now.getHours('05:30')", 11),
        ("now.getHours('+' + '01:00')", 7),
        ("now.getHours(true ? '+01:00' : 'Europe/Berln')", 7),
        ("duration('7h').getHours()", 7),
        ("parameters['now.getHours(risk)']", 5),
    ],
)
def test_a_zone_that_exists_is_read(call: str, hour: int) -> None:
    assert holds(f"{call} == {hour}", now=6 * 3_600_000_000, parameters={"now.getHours(risk)": 5})


def zones(folder: Path, *names: str) -> None:
    """A time zone database: each zone is 3 hours ahead of UTC."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        head = struct.pack(">4sc15x6L", b"TZif", b"2", 0, 0, 0, 0, 1, 4)
        block = head + struct.pack(">lbB4s", 3 * 3600, 0, 0, b"+03\0")
        file.write_bytes(block + block + b"\n<+03>-3\n")


def read_with(database: Path, zone: str) -> str:
    """What a new process says of a zone, since the engine keeps what it has found once."""
    program = (
        "import sys; from sidecar.policies._conditions import WrongText, condition\n"
        "try: condition(f'now.getHours({sys.argv[1]!r}) == 1')\n"
        "except WrongText as exc: print(exc, exc.position)\n"
        "else: print('well')"
    )
    environment = {**os.environ, "TZDIR": str(database)}
    return subprocess.run(
        [sys.executable, "-c", program, zone], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_database_that_counts_is_the_one_that_the_engine_uses(tmp_path: Path) -> None:
    zones(tmp_path, "Etc/GMT", "Europe/Berln")
    assert read_with(tmp_path, "Europe/Berln") == "well"
    assert read_with(tmp_path, "Europe/Berlin") == (
        'getHours(...) takes a time zone, such as getHours("Europe/Berlin") or getHours("-08:00"); '
        "this is none (1, 5)"
    )


def test_without_a_database_only_utc_and_offsets_are_zones(tmp_path: Path) -> None:
    assert read_with(tmp_path, "UTC") == read_with(tmp_path, "-08:00") == "well"
    assert read_with(tmp_path, "Europe/Berlin") == (
        "getHours(...) needs a time zone database, and none is found; install tzdata, set TZDIR, or write an "
        "offset (1, 5)"
    )


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("risk.matches(parameters.v)", 6),
        ("risk == 'matches()' || risk . matches ( 'a' + parameters.v )", 31),
        ("risk.matches('a' // 'b')\n + action)", 6),
        ("matches('a', parameters.v)", 1),
        ("matches(parameters.v, 'a')", 1),
    ],
)
def test_a_pattern_that_is_sent_is_refused_since_it_may_take_long_to_prepare(text: str, column: int) -> None:
    said, position = mistake(text)
    assert said == 'matches(...) takes one text in quotes, as in action.matches("restart_.*")'
    assert position == (1, column)


def test_a_pattern_that_is_no_regular_expression_is_a_mistake() -> None:
    said = "matches(...) is given a text that is no regular expression; correct it"
    assert mistake("true &&\n action.matches('restart_(.*')") == (said, (2, 9))
    assert mistake("action.matches('a' // fine\n) || action.matches(r'(?=a)')") == (said, (2, 13))


@pytest.mark.parametrize(
    "text",
    [
        'action.matches("restart_.*")',
        "action . matches ( r'restart.+' )",
        "parameters.namespace.matches('^(prod|test)$')",
        'action.matches("""restart\n|""" // a comment\n)',
        '"matches(" != risk',
        "has(parameters.matches) || true",
    ],
)
def test_a_pattern_that_stands_in_the_condition_is_matched(text: str) -> None:
    assert holds(text)


def test_a_condition_of_the_greatest_length_is_read() -> None:
    assert holds("true" + " " * (MAX_CHARS - 4))


def test_a_condition_that_may_come_to_anything_is_judged_when_it_is_known() -> None:
    assert holds("parameters.v", parameters={"v": True})
    assert failure("parameters.v", parameters={"v": "true"}) == "it is neither true nor false."


def test_without_the_engine_a_condition_is_a_mistake_that_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write(tmp_path, "    when: risk == 'low'\n")
    assert len(load(tmp_path).rules) == 1
    monkeypatch.setitem(sys.modules, "cel_expr_python", None)
    assert faults(tmp_path) == [
        "a.yaml:6:5: rules[0].when: needs the engine for conditions; install it with scopegate[cel]"
    ]
    write(tmp_path, "")
    assert len(load(tmp_path).rules) == 1


# In a file -----------------------------------------------------------------------------------------------


def test_a_zone_that_does_not_exist_is_a_mistake_with_its_place_in_the_file(tmp_path: Path) -> None:
    write(tmp_path, "    when: |\n      risk == 'low' ||\n      now.getHours('Europe/Berln') < 8\n")
    (fault,) = faults(tmp_path)
    assert fault.startswith("a.yaml:8:11: rules[0].when: getHours(...) ")


def write(folder: Path, when: str) -> None:
    """A policy file with one rule, which lines follow from the sixth on."""
    head = "actions: {x: {risk: low}}\nrules:\n  - id: r\n    on: execute\n    effect: deny\n"
    (folder / "a.yaml").write_text(head + when, encoding="utf-8")


def faults(folder: Path) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        load(folder)
    return [str(fault).replace(f"{folder}/", "") for fault in caught.value.faults]


WRONG = 'rsk is no fact; did you mean "risk"?'


@pytest.mark.parametrize(
    ("when", "said"),
    [
        ("    when: rsk == 'low'\n", f"6:11: rules[0].when: {WRONG}"),
        ("    when: risk != 'a' && rsk == 'low' # here\n", f"6:26: rules[0].when: {WRONG}"),
        ("    when:\n      risk != 'a' && rsk == 'low'\n", f"7:22: rules[0].when: {WRONG}"),
        ('    when: \'risk != "a" && rsk == "b"\'\n', f"6:27: rules[0].when: {WRONG}"),
        ("    when: \"risk != 'a' && rsk == 'b'\"\n", f"6:27: rules[0].when: {WRONG}"),
        ("    when: |\n      rsk == 'low'\n", f"7:7: rules[0].when: {WRONG}"),
        ("    when: |\n      risk != 'a'\n        && rsk == 'low'\n", f"8:12: rules[0].when: {WRONG}"),
        ("    when: |-\n\n      risk != 'a' &&\n      rsk == 'b'\n", f"9:7: rules[0].when: {WRONG}"),
        ("    when: '\u00e9' == rsk\n", None),
        (
            "    when: |\n      risk ==\n\n    mode: shadow\n",
            "7:14: rules[0].when: ends too early; complete it, and close its brackets and quotes",
        ),
        # Not shown as it is: the place where it begins, and words.
        (
            "    when: >\n      risk != 'a' &&\n      rsk == 'low'\n",
            f"6:11: rules[0].when: {WRONG} (line 1, column 16 of this text)",
        ),
        (
            "    when: risk != 'a' &&\n      rsk == 'low'\n",
            f"6:11: rules[0].when: {WRONG} (line 1, column 16 of this text)",
        ),
        (
            '    when: "risk != \\"a\\" && rsk == \\"b\\""\n',
            f"6:11: rules[0].when: {WRONG} (line 1, column 16 of this text)",
        ),
        (
            "    when: 'risk != ''a'' && rsk == ''b'''\n",
            f"6:11: rules[0].when: {WRONG} (line 1, column 16 of this text)",
        ),
        # Of the condition as a whole: the place of the key.
        (
            "    when: risk\n",
            "6:5: rules[0].when: must come to true or false, not to string; compare it with something",
        ),
    ],
)
def test_a_mistake_in_a_file_is_named_at_the_very_place(tmp_path: Path, when: str, said: str | None) -> None:
    write(tmp_path, when)
    found = faults(tmp_path)
    assert len(found) == 1
    if said is None:
        assert found[0].startswith("a.yaml:6:1")
    else:
        assert found == [f"a.yaml:{said}"]


# Any text ------------------------------------------------------------------------------------------------

SIGNS = "== != && || ! < + - / ? : ( ) [ ] { } . , in true null 1 0 1.5 9223372036854775807 x dyn(1) b'x'"
BROKEN = '"a" \'b\' r"\\" """ \' " \\ "([" [0] .size() timestamp( duration( .matches( \u00e9 .all(x,true)'
MORE = (".map(x, x)", ".exists(x, x == x)", "has(parameters.v)", "// it's\n", "\n")
TOKENS = st.sampled_from([*FACTS, *SIGNS.split(), *BROKEN.split(), *MORE])
WHEN = st.text(max_size=30) | st.builds(str.join, st.sampled_from(["", " "]), st.lists(TOKENS, max_size=14))


@given(WHEN)
@example("google.protobuf.Any{}")
@example("\x00")
@example("\ud800")
@example("a\rb")
@settings(deadline=None, max_examples=500)
def test_any_text_is_a_condition_that_answers_or_fails_or_a_mistake_with_a_place(text: str) -> None:
    try:
        found = condition(text)
    except WrongText as exc:
        lines = text.split("\n")
        if exc.position is not None:
            line, column = exc.position
            assert 1 <= line <= len(lines)
            assert 1 <= column <= len(lines[line - 1]) + 1
        return
    with suppress(ConditionFailed):
        assert found(subject()) in (True, False)


# Whatever comes to true or false here, so that most of what is drawn can be judged.
TERMS = st.sampled_from(
    [
        *(f"{fact} == {fact}" for fact in FACTS),
        *(
            'action == "risk // intent"',
            "'\\'intent' != action",
            "r'\\d' == risk",
            "'''a\"''' == '''intent'''",
        ),
        *("parameters.v == 1", "has(parameters.intent)", '"v" in parameters', "parameters.all(x, x != risk)"),
        *("true // don't, \"\n", "[risk].exists(action, action == intent)", "parameters . v == parameters.w"),
    ]
)


@given(st.lists(TERMS, min_size=1, max_size=5), st.sampled_from([" && ", "||", "\n|| "]))
@settings(deadline=None, max_examples=200)
def test_what_a_condition_is_said_to_read_is_enough_to_judge_it(terms: list[str], sign: str) -> None:
    found = condition(sign.join(terms))
    # The engine itself, told of nothing else, takes it as well.
    kinds = {"target_agents": cel.Type.List(cel.Type.STRING), "now": cel.Type.TIMESTAMP}
    kinds["parameters"] = cel.Type.Map(cel.Type.STRING, cel.Type.DYN)
    known = {name: kinds.get(name, cel.Type.STRING) for name in found.reads}
    assert cel.NewEnv(variables=known).compile(found.text).return_type() == cel.Type.BOOL
    # And what is handed over of the parameters makes no difference.
    all_parameters = conditions.CelCondition(found.text, found.reads, None, found.compiled)
    parameters = {"v": 1, "w": 1, "intent": 2, "other": 3}
    assert found(subject(parameters=parameters)) == all_parameters(subject(parameters=parameters))


# Several conditions together -----------------------------------------------------------------------------

TOGETHER = st.sampled_from(
    [
        *("true", "false", "false // don't", "risk == 'high'", "attempts_used > 1", "now < timestamp(0)"),
        *("parameters.v == 1", "has(parameters.v)", "1 / attempts_used == 1", "parameters.v", "dyn(1)"),
        *("risk != 'low'", "attempts_used >= 1 || tenant_id == 'x'", "{'a': true, 'b': parameters.v}['b']"),
        *("target_agents.exists(one, one == 'a-2')", "true ? dyn(parameters.v) : false", "!parameters.v"),
        *("parameters.all(name, name != 'v')", '"[" != "]"', 'action == "restart_pod" || parameters.v'),
    ]
)
KNOWN: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {"attempts_used": st.integers(0, 2)},
    optional={
        "parameters": st.sampled_from([{}, {"v": 1}, {"v": True}, {"v": [0] * MAX_VALUES}, {"v": object()}]),
        "risk": st.sampled_from([None, *RiskClass]),
    },
)


@given(st.lists(TOGETHER, min_size=1, max_size=6), KNOWN)
@settings(deadline=None)
def test_conditions_come_to_the_same_together_as_one_by_one(texts: list[str], known: dict[str, Any]) -> None:
    each, about = [condition(text) for text in texts], subject(**known)
    alone: list[bool | None] = []
    for one in each:
        try:
            alone.append(one(about))
        except ConditionFailed:
            alone.append(None)
    together = joint(each)
    if together is None:
        anything = any(one.compiled.return_type() != cel.Type.BOOL for one in each)
        assert anything or len(set(texts)) == 1
        return
    try:
        found = together(about)
    except ConditionFailed:
        assert None in alone
    else:
        assert [*found] == alone
        assert {*map(type, found)} == {bool}


def test_what_only_all_conditions_together_exceed_fails_together_and_holds_alone() -> None:
    wide = {"one": [0] * (MAX_VALUES // 2), "two": [0] * (MAX_VALUES // 2)}
    each = [condition("parameters.one[0] == 0"), condition("parameters.two[0] == 0")]
    together = joint(each)
    assert together is not None
    about = subject(parameters=wide)
    assert [one(about) for one in each] == [True, True]
    with pytest.raises(ConditionFailed, match="values"):
        together(about)
    loops = "target_agents.all(a, target_agents.all(b, a != 'x{}'))"
    each = [condition(loops.format(number)) for number in range(9)]
    together, about = joint(each), subject(target_agents=tuple(f"a-{number}" for number in range(64)))
    assert together is not None
    assert [one(about) for one in each] == [True] * 9
    with pytest.raises(ConditionFailed):
        together(about)


def test_conditions_that_are_too_long_or_too_deep_together_are_judged_alone() -> None:
    long = [condition(f"intent != '{number}{'x' * (MAX_CHARS - 20)}'") for number in range(30)]
    assert joint(long) is None
    assert joint(long[:20]) is not None
    deep = condition("(" * 32 + "true" + ")" * 32)
    assert joint([deep, condition("false")]) is None
    assert joint([deep]) is None


def test_what_is_not_a_condition_of_the_engine_is_judged_alone() -> None:
    @dataclass(frozen=True)
    class Other:
        text: str = "attempts_used > 3"
        reads: frozenset[str] = frozenset({"attempts_used"})

        def __call__(self, subject: Subject) -> bool:
            return True

    assert joint([condition("attempts_used > 3"), Other()]) is None


def test_the_rules_of_a_file_are_judged_together_and_one_that_fails_is_found(tmp_path: Path) -> None:
    whens = ("attempts_used < 9", "parameters.replicas == 3", "parameters.replicas == 4", "tenant_id == 'x'")
    rules = [
        f'  - {{id: rule-{number}, on: execute, when: "{when}", effect: deny}}\n'
        for number, when in enumerate(whens)
    ]
    (tmp_path / "a.yaml").write_text("actions: {restart_pod: {risk: high}}\nrules:\n" + "".join(rules))
    policies = load(tmp_path)
    known = preview(policies, "execute", subject())
    ((early,),) = [bundle.early for bundle in known.bundles]
    assert early.joint is not None
    assert [rule.id for rule in early.rules] == ["rule-1", "rule-2", "rule-3"]
    assert [rule.id for rule in known.early.holding] == ["rule-1"]
    bare = preview(policies, "execute", subject(parameters={}))
    assert [rule.id for rule, _ in bare.early.failed] == ["rule-1", "rule-2"]
    assert bare.early.holding == []


# Plain conditions ----------------------------------------------------------------------------------------

BLANKS = st.sampled_from(["", " ", "\n ", "\t"])
CONSTANTS = st.sampled_from(["", "high", "team-a", "bot", "a b", "#1", "{x}", "[1]", "%s", "//"])
QUOTED = st.builds(lambda text, quote: f"{quote}{text}{quote}", CONSTANTS, st.sampled_from(["'", '"']))
WHOLE = st.sampled_from([0, 1, 2, 90, -1, 10**18 - 1]).map(str)
TIMES = st.sampled_from(
    [
        *("2026-12-24T00:00:00Z", "2026-12-24T00:00:00.000001Z", "2026-12-23T23:59:59.999999Z"),
        *(
            "2026-12-24T00:00:00.5Z",
            "0001-01-01T00:00:00Z",
            "9999-12-31T23:59:59.999999Z",
            "1969-12-31T00:00:00Z",
        ),
    ]
)
PLAIN_TERMS = st.one_of(
    st.tuples(
        BLANKS,
        st.sampled_from(sorted(_plain.TEXTS)),
        BLANKS,
        st.sampled_from(["==", "!="]),
        BLANKS,
        QUOTED,
        BLANKS,
    ),
    st.tuples(
        BLANKS,
        st.sampled_from(sorted(_plain.TEXTS)),
        st.just(" in ["),
        st.lists(QUOTED, min_size=1, max_size=3).map(", ".join),
        st.just("]"),
    ),
    st.tuples(
        BLANKS,
        st.just("now"),
        BLANKS,
        st.sampled_from(["==", "!=", "<", "<=", ">", ">="]),
        BLANKS,
        TIMES.map(lambda time: f'timestamp("{time}")') | TIMES.map("timestamp('{}')".format),
        BLANKS,
    ),
    st.tuples(
        BLANKS,
        st.sampled_from(sorted(_plain.NUMBERS)),
        BLANKS,
        st.sampled_from(["==", "!=", "<", "<=", ">", ">="]),
        BLANKS,
        WHOLE,
        BLANKS,
    ),
).map("".join)
PLAIN = st.lists(st.tuples(PLAIN_TERMS, st.sampled_from(["&&", "||"])), min_size=1, max_size=4).map(
    lambda terms: "".join(part for term in terms for part in term)[:-2]
)
SOMETIMES_ODD = st.fixed_dictionaries(
    {},
    optional={
        "risk": st.sampled_from([None, *RiskClass]),
        "tenant_id": st.sampled_from(["team-a", "é", "\ud800", "a\0b", ""]),
        "principal": st.sampled_from(["bot", "a b", "\n"]),
        "attempts_used": st.sampled_from([0, 1, 2, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1]),
        "max_cost": st.sampled_from([0, 90, 2**64]),
        "now": st.sampled_from(
            [0, 1, -1, CHRISTMAS_EVE + 1, CHRISTMAS_EVE + 500_000, 2**57 - 1, 2**57, 2**62]
        ),
    },
)


@given(st.lists(PLAIN, min_size=1, max_size=3), SOMETIMES_ODD)
@settings(deadline=None, max_examples=300)
def test_a_plain_condition_comes_to_what_the_engine_says(texts: list[str], known: dict[str, Any]) -> None:
    about = subject(**known)
    assert all(_plain.translated(text) is not None for text in texts)
    each = [condition(text) for text in texts]
    together = joint(each)
    assert together is not None
    try:
        found = together(about)
    except ConditionFailed:
        # Only a value that is not plain fails, and then the engine judges.
        odd = (value for value in known.values() if isinstance(value, int) and not 0 <= value < 2**57)
        assert {"\ud800", "a\0b", "\n"}.intersection(known.values()) or any(odd)
    else:
        assert list(found) == [one(about) for one in each]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "attempts_used == 1 == true",
        '"high" == risk',
        "risk == 'a\\n'",
        "risk == r'a'",
        "risk == b'a'",
        "risk == 'é'",
        'risk == """a"""',
        "risk == 'a' 'b'",
        "risk < 'high'",
        "attempts_used > 1u",
        "attempts_used > 1.0",
        "attempts_used > 1e3",
        "attempts_used > 0x10",
        "attempts_used > 010",
        "attempts_used > 9223372036854775807",
        "attempts_used > attempts_remaining",
        "attempts_used > 1 &&",
        "&& attempts_used > 1",
        "attempts_used > 1 // once",
        "!(attempts_used > 1)",
        "(attempts_used > 1)",
        "attempts_used in [1]",
        "risk in []",
        "risk in ['a',]",
        "intent == 'a'",
        "now == timestamp(0)",
        "now == timestamp('2026-12-24T00:00:00.0000001Z')",
        "now == timestamp('2026-12-24T00:00:00+01:00')",
        "now == timestamp('2026-02-30T00:00:00Z')",
        "now == timestamp('2026-12-24T00:00:60Z')",
        "now == timestamp('2026-12-24T00:00:00Z\")",
        "now - timestamp('2026-12-24T00:00:00Z') < duration('1h')",
        "now == timestamp(action)",
        "parameters.v == 'a'",
        "risky == 'a'",
        "parameters.risk == 'a'",
        "risk == 'a' and risk == 'b'",
        "risk == action",
        "__import__('os')",
    ],
)
def test_every_other_condition_is_left_to_the_engine(text: str) -> None:
    assert _plain.translated(text) is None
    assert _plain.translated(f"risk == 'a' || {text}") is None


@given(WHEN)
@settings(deadline=None, max_examples=300)
def test_any_text_that_is_plain_is_one_that_the_engine_reads_alike(text: str) -> None:
    if _plain.translated(text) is not None:
        found = joint([condition(text)])
        assert found is not None
        assert list(found(subject())) == [condition(text)(subject())]

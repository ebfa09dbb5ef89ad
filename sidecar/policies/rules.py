"""The rules of policy files. A rule that could not do what it says is refused when it is read, never skipped.

Ids are unique over all files, and a rule for actions that nobody can ask for is a mistake: a brake with a
misspelled action would look as if it braked.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_left
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, cast, get_args

from sidecar.core.facts import is_identifier
from sidecar.core.policy import (
    Brake,
    Condition,
    Facet,
    Limit,
    Match,
    Phase,
    Require,
    RiskClass,
    Rule,
    globbed,
)
from sidecar.core.wording import visible_chars
from sidecar.errors import Fault
from sidecar.files.yamlfile import did_you_mean
from sidecar.policies.conditions import NoCondition, condition
from sidecar.policies.values import IDENTIFIER, Entry
from sidecar.settings.values import MAX_SECONDS, kind

RISKS = tuple(risk.value for risk in RiskClass)
MAX_ATTEMPTS = 1_000_000
MAX_TTL_SECONDS = 366 * MAX_SECONDS
MAX_BRAKE_SECONDS = 30 * MAX_SECONDS
MAX_INTENT_CHARS = 2000
MAX_REASON_CHARS = 1000
# To find the nearest of thousands of actions takes long; whoever has more mistakes than this has another one.
MAX_SUGGESTIONS = 20

# A large set is read beside requests, in one process: after so many rules those get a turn. To prepare a
# condition takes as long as to read several rules without one.
RULES_IN_A_ROW = 50
CONDITION_IN_RULES = 5
TURN_SECONDS = 0.0002

RULE_KEYS = ("id", "on", "match", "limit", "require", "brake", "when", "effect", "mode", "reason")
MATCH_KEYS = ("risk", "action", "incident_id", "tenant_id", "principal", "target_agents")
LIMIT_KEYS = ("max_attempts", "ttl_seconds", "max_cost_usd")
REQUIRE_KEYS = ("intent_min_chars", "target_agents")
BRAKE_KEYS = ("per", "max_attempts", "window_seconds", "cooldown_seconds", "one_in_flight")

_EXAMPLE = "{id: no-failover, on: execute, match: {action: failover_db}, effect: deny}"
_PHASES = get_args(Phase)
_FACETS = get_args(Facet)
_DOES = ("limit", "require", "brake")


@dataclass(slots=True)
class Rules:
    """The rules of all files as they are read. Mistakes go to `faults`."""

    faults: list[Fault]
    found: list[Rule] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    # The globs on actions with place and key. They can only be judged once the catalogue is complete.
    _globs: list[tuple[str, str, str]] = field(default_factory=list)
    _in_a_row: int = 0

    def add(self, file: Entry, rules: Any) -> None:
        """What stands under `rules:` in one file."""
        if not isinstance(rules, list):
            file.fault(("rules",), f"expects a list of rules, found {kind(rules)}")
            return
        for number, value in enumerate(rules):
            path = ("rules", number)
            entry = Entry.of(file.document, path, value, self.faults, keys=RULE_KEYS, example=_EXAMPLE)
            if entry is not None:
                self._add(entry)
                self._give_way(CONDITION_IN_RULES if "when" in entry else 1)

    def check_actions(self, names: Collection[str]) -> None:
        """Finds the globs that mean none of the actions, which are all that can be asked for."""
        ordered = sorted(names)
        suggestions = 0
        for place, key, glob in self._globs:
            if not _means_any(glob, ordered):
                suggestions += 1
                near = did_you_mean(glob, ordered) if suggestions <= MAX_SUGGESTIONS else ""
                message = f"matches no action of the catalogue{near or '; correct it, or list the action'}"
                self.faults.append(Fault(place, key, message))

    def _add(self, entry: Entry) -> None:
        before = len(self.faults)
        rule_id = self._id(entry)
        on = cast(Phase, entry.choice("on", _PHASES))
        match = self._match(entry)
        limit, require, brake = _limit(entry, on), _require(entry), _brake(entry, on)
        deny = _deny(entry)
        when = _when(entry)
        shadow = "mode" in entry and entry.choice("mode", ("enforce", "shadow")) == "shadow"
        reason = _reason(entry)
        if "effect" not in entry and not any(key in entry for key in _DOES):
            entry.fault((), "does nothing; add limit, require, brake or effect: deny")
        if len(self.faults) == before:
            self.found.append(
                Rule(
                    id=rule_id,
                    on=on,
                    match=match,
                    when=when,
                    limit=limit,
                    require=require,
                    brake=brake,
                    deny=deny,
                    shadow=shadow,
                    reason=reason,
                )
            )

    def _give_way(self, rules: int) -> None:
        self._in_a_row += rules
        if self._in_a_row >= RULES_IN_A_ROW:
            self._in_a_row = 0
            time.sleep(TURN_SECONDS)

    def _id(self, entry: Entry) -> str:
        rule_id = str(entry.values.get("id", ""))
        if not is_identifier(entry.values.get("id")):
            missing = "is required; give each rule an id of its own"
            entry.fault(("id",), f"expects text of {IDENTIFIER}" if "id" in entry else missing)
            return ""
        if rule_id in self.places:
            entry.fault(("id",), f"stands in {self.places[rule_id]}, too; give each rule an id of its own")
        self.places.setdefault(rule_id, entry.document.place((*entry.path, "id")))
        return rule_id

    def _match(self, entry: Entry) -> Match:
        inner = entry.inner("match", keys=MATCH_KEYS, example="{risk: high}")
        if inner is None:
            return Match()
        for key in MATCH_KEYS:
            if inner.values.get(key) == []:
                inner.fault((key,), "is an empty list; name at least one, or remove the key")
        for below, glob in inner.items("action"):
            if is_identifier(glob):
                self._globs.append((*inner.where(below), glob))
        return Match(
            risk=frozenset(RiskClass(risk) for risk in inner.choices("risk", RISKS)),
            action=inner.identifiers("action"),
            incident_id=inner.identifiers("incident_id"),
            tenant_id=inner.identifiers("tenant_id"),
            principal=inner.identifiers("principal"),
            target_agents=inner.identifiers("target_agents"),
        )


def _limit(entry: Entry, on: Phase | None) -> Limit | None:
    inner = entry.inner("limit", keys=LIMIT_KEYS, example="{max_attempts: 1}")
    if on == "execute" and "limit" in entry:
        entry.fault(("limit",), "is about what a scope may grant; write on: issue, or use a brake")
    if inner is None:
        return None
    if not any(key in inner for key in LIMIT_KEYS):
        inner.fault((), f"limits nothing; add {', '.join(LIMIT_KEYS[:-1])} or {LIMIT_KEYS[-1]}")
    return Limit(
        max_attempts=inner.whole("max_attempts", 1, MAX_ATTEMPTS),
        ttl_seconds=inner.whole("ttl_seconds", 1, MAX_TTL_SECONDS),
        max_cost=inner.micros("max_cost_usd"),
    )


def _require(entry: Entry) -> Require | None:
    inner = entry.inner("require", keys=REQUIRE_KEYS, example="{intent_min_chars: 20}")
    if inner is None:
        return None
    if not _any_of(inner, REQUIRE_KEYS):
        inner.fault((), "requires nothing; add intent_min_chars or target_agents: true")
    return Require(
        intent_min_chars=inner.whole("intent_min_chars", 1, MAX_INTENT_CHARS) or 0,
        target_agents=inner.flag("target_agents"),
    )


def _brake(entry: Entry, on: Phase | None) -> Brake | None:
    inner = entry.inner("brake", keys=BRAKE_KEYS, example="{max_attempts: 3, window_seconds: 3600}")
    if on == "issue" and "brake" in entry:
        entry.fault(("brake",), "counts executions; write on: execute, or use a limit")
    if inner is None:
        return None
    if not _any_of(inner, ("max_attempts", "cooldown_seconds", "one_in_flight")):
        inner.fault((), "brakes nothing; add max_attempts, cooldown_seconds or one_in_flight: true")
    for key in ("max_attempts", "one_in_flight"):
        if "window_seconds" not in inner and _any_of(inner, (key,)):
            inner.fault(("window_seconds",), f"is required with {key}; add how long an execution counts")
            break
    return Brake(
        per=cast(tuple[Facet, ...], inner.choices("per", _FACETS)),
        max_attempts=inner.whole("max_attempts", 1, MAX_ATTEMPTS),
        window_seconds=inner.whole("window_seconds", 1, MAX_BRAKE_SECONDS) or 0,
        cooldown_seconds=inner.whole("cooldown_seconds", 1, MAX_BRAKE_SECONDS) or 0,
        one_in_flight=inner.flag("one_in_flight"),
    )


def _any_of(entry: Entry, keys: tuple[str, ...]) -> bool:
    """Whether one of the keys asks for something. A value that is wrong was meant to."""
    return any(entry.values.get(key, False) is not False for key in keys)


def _deny(entry: Entry) -> bool:
    if "effect" not in entry:
        return False
    if entry.values["effect"] == "allow":
        message = (
            "allow is refused: a refusal by any rule refuses, so there is nothing to allow; remove the rule"
        )
        entry.fault(("effect",), message)
        return False
    for key in _DOES:
        if key in entry:
            entry.fault((key,), "does nothing beside effect: deny, which refuses anyway; remove one of them")
    return entry.choice("effect", ("deny",)) == "deny"


def _when(entry: Entry) -> Condition | None:
    if "when" not in entry:
        return None
    text = entry.values["when"]
    if not isinstance(text, str):
        entry.fault(("when",), f"expects a condition as text, found {kind(text)}; write it in quotes")
        return None
    try:
        return condition(text)
    except NoCondition as exc:
        if exc.position is None:
            entry.fault(("when",), str(exc))
        else:
            entry.fault_within("when", text, exc.position, str(exc))
        return None


def _reason(entry: Entry) -> str:
    """On one line, however it is broken in the file."""
    reason = entry.values.get("reason", "")
    if not isinstance(reason, str):
        entry.fault(("reason",), f"expects text, found {kind(reason)}; write it in quotes")
        return ""
    line = " ".join(reason.split())
    if len(line) > MAX_REASON_CHARS or not line.isprintable():
        entry.fault(("reason",), f"expects at most {MAX_REASON_CHARS} characters without controls")
    elif reason and not visible_chars(line):
        entry.fault(("reason",), "says nothing that a reader sees; write a reason, or remove the key")
    return line


def _means_any(glob: str, ordered: list[str]) -> bool:
    """Whether a glob means one of the names, which are in order. Few of them begin as it does."""
    plain = re.split(r"[*?\[]", glob, maxsplit=1)[0]
    return any(
        name == glob or glob == plain + "*" or (glob != plain and globbed((glob,), name))
        for name in _beginning(plain, ordered)
    )


def _beginning(plain: str, ordered: list[str]) -> Iterator[str]:
    for number in range(bisect_left(ordered, plain), len(ordered)):
        if not ordered[number].startswith(plain):
            return
        yield ordered[number]

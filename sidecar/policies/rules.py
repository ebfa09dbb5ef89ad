"""The rules of policy files. A rule that cannot take effect is refused when it is read, never skipped.

Ids are unique over all files. A rule for actions that no scope can name is a mistake, because a brake with a
misspelled action would look effective.

A map of a policy file is read key by key. The reader records a mistake with its place and continues with the
other keys, so that one load of a folder reports every mistake in it.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, cast, get_args

from sidecar.core.facts import MAX_ID_CHARS, is_identifier
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
from sidecar.files.faults import Fault
from sidecar.files.yamlfile import Document, KeyPath, did_you_mean, dotted
from sidecar.policies.conditions import NoCondition, condition
from sidecar.settings.values import MAX_SECONDS, kind, micros_of

IDENTIFIER = f"1 to {MAX_ID_CHARS} printable characters"


class Entry:
    """A map at a path of a document, with the list that collects its mistakes."""

    __slots__ = ("document", "faults", "path", "values")

    def __init__(
        self, document: Document, path: KeyPath, values: Mapping[str, Any], faults: list[Fault]
    ) -> None:
        self.document = document
        self.path = path
        self.values = values
        self.faults = faults

    @classmethod
    def of(
        cls,
        document: Document,
        path: KeyPath,
        value: Any,
        faults: list[Fault],
        *,
        keys: Sequence[str],
        example: str,
    ) -> Entry | None:
        """The value as a map with these keys, or None if it is not a map. Other keys are mistakes."""
        entry = cls(document, path, value, faults)
        if not isinstance(value, dict):
            entry.fault((), f"expects a map such as {example}, found {kind(value)}")
            return None
        entry.check_keys(keys)
        return entry

    def check_keys(self, keys: Sequence[str]) -> None:
        for key in self.values:
            if key not in keys:
                self.fault((key,), f"is not a known key{did_you_mean(key, keys)}")

    def inner(self, key: str, *, keys: Sequence[str], example: str) -> Entry | None:
        """The map below a key, or None if the key is absent or its value is not a map."""
        if key not in self.values:
            return None
        path = (*self.path, key)
        return Entry.of(self.document, path, self.values[key], self.faults, keys=keys, example=example)

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def where(self, below: KeyPath) -> tuple[str, str]:
        """The place of a path below the map, and the dotted path."""
        path = (*self.path, *below)
        return self.document.place(path), dotted(path)

    def fault(self, below: KeyPath, message: str) -> None:
        """Record a mistake at a path below the map, unless the place is already known as faulty YAML."""
        if not self.document.is_broken((*self.path, *below)):
            self.faults.append(Fault(*self.where(below), message))

    def fault_within(self, key: str, text: str, position: tuple[int, int], message: str) -> None:
        """Record a mistake at a line and column of the text value of a key."""
        path = (*self.path, key)
        if not self.document.is_broken(path):
            place, where = self.document.place_within(path, text, *position)
            self.faults.append(Fault(place, dotted(path), message + where))

    def whole(self, key: str, low: int, high: int) -> int | None:
        if key not in self.values:
            return None
        value = self.values[key]
        if isinstance(value, bool) or not isinstance(value, int):
            self.fault((key,), f"expects a whole number, found {kind(value)}")
        elif not low <= value <= high:
            self.fault((key,), f"must be from {low} to {high}")
        else:
            return value
        return None

    def flag(self, key: str) -> bool:
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            self.fault((key,), f"expects true or false, found {kind(value)}")
            return False
        return value

    def seconds(self, key: str, high: int) -> float | None:
        """Seconds with a fraction, above 0."""
        if key not in self.values:
            return None
        value = self.values[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fault((key,), f"expects a number of seconds, found {kind(value)}")
        elif not 0 < value <= high or not isfinite(value):
            self.fault((key,), f"must be above 0 and at most {high}")
        else:
            return float(value)
        return None

    def micros(self, key: str) -> int | None:
        """An amount of dollars, in micro-dollars."""
        if key not in self.values:
            return None
        try:
            return micros_of(self.values[key])
        except ValueError as exc:
            self.fault((key,), str(exc))
            return None

    def choice(self, key: str, choices: Sequence[str]) -> str | None:
        """One of a few words, which must be there."""
        if key not in self.values:
            self.fault((key,), f"is required; add one of {', '.join(choices)}")
            return None
        return self._one_of((key,), self.values[key], choices)

    def choices(self, key: str, choices: Sequence[str]) -> tuple[str, ...]:
        """One of a few words, or a list of them."""
        found = [self._one_of(below, value, choices) for below, value in self.items(key)]
        return tuple(word for word in found if word is not None)

    def identifiers(self, key: str) -> tuple[str, ...]:
        """One text, or a list of texts, each a valid identifier."""
        found = []
        for below, value in self.items(key):
            if is_identifier(value):
                found.append(value)
            elif isinstance(value, str):
                self.fault(below, f"expects {IDENTIFIER}")
            else:
                self.fault(below, f"expects text, found {kind(value)}; write it in quotes")
        return tuple(found)

    def items(self, key: str) -> list[tuple[KeyPath, Any]]:
        """The items of a list, each with its path. A single value counts as a list of one."""
        value = self.values.get(key)
        if isinstance(value, list):
            return [((key, number), item) for number, item in enumerate(value)]
        return [((key,), value)] if key in self.values else []

    def _one_of(self, below: KeyPath, value: Any, choices: Sequence[str]) -> str | None:
        if isinstance(value, str) and value in choices:
            return value
        near = did_you_mean(value, choices) if isinstance(value, str) else ""
        self.fault(below, f"expects one of {', '.join(choices)}{near}")
        return None


RISKS = tuple(risk.value for risk in RiskClass)
MAX_ATTEMPTS = 1_000_000
MAX_TTL_SECONDS = 366 * MAX_SECONDS
MAX_BRAKE_SECONDS = 30 * MAX_SECONDS
MAX_INTENT_CHARS = 2000
MAX_REASON_CHARS = 1000
# Finding the nearest of thousands of actions takes long. With more mistakes than this, spelling is not the
# cause.
MAX_SUGGESTIONS = 20

# A large set is read while the same process serves requests, so the reader pauses after this number of rules.
# Compiling a condition takes as long as reading several rules without one.
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
    """Collects the rules of all files. Mistakes go to `faults`."""

    faults: list[Fault]
    found: list[Rule] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    # The globs on actions, each with its place and key. They are checked once the catalogue is complete.
    _globs: list[tuple[str, str, str]] = field(default_factory=list)
    _in_a_row: int = 0

    def add(self, file: Entry, rules: Any) -> None:
        """Add the rules under `rules:` in one file."""
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
        """Report the globs that match none of the actions.

        `names` holds all actions that can be requested.
        """
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
    """Whether one of the keys has an effect.

    An invalid value counts, because its mistake is reported already.
    """
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
    """The reason on one line, even if the file breaks it into several."""
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
    """Whether a glob matches one of the sorted names. Only names with its literal prefix are tested."""
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

"""A rule's `when`: a CEL condition, checked when it is read. If it cannot be judged, it raises an error.

The engine is compiled code that blocks the whole process while it runs. It stops after 10,000 steps, but a
step may touch everything that a client sent. A condition therefore gets only the facts that it reads, in a
limited amount. Failures are described in the sidecar's own words, because the engine's messages may quote
values, and a value may be a secret.

The engine checks types when it compiles, but it does not check quoted texts. A mistake in one would refuse
every request that the condition judges. The engine therefore evaluates these texts when the condition is
read:

1. A conversion of constants alone, such as timestamp("2026-13-01"), is evaluated.
2. The pattern of `matches` and the zone of `getHours` and similar functions must be constants. The engine
   reads a zone from a file and keeps it for the life of the process. A zone chosen by a request could open
   any file, for example a pipe, which blocks the process.
3. A zone is evaluated in this process, because its environment (TZDIR and the files there) selects the zone
   database. The engine also accepts offsets such as "+99:99", so offsets must be at most 23:59.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from operator import attrgetter
from typing import Any

from sidecar.core.instant import to_datetime
from sidecar.core.policy import FACTS, Condition, Joint, RiskClass, Subject
from sidecar.errors import ConditionFailed
from sidecar.files.faults import shown
from sidecar.files.yamlfile import did_you_mean
from sidecar.policies import _plain
from sidecar.settings.faults import WrongText

MAX_CHARS = 4096
# Limits on the parameters that a condition reads: values at all depths, and characters of texts and keys.
# Within these limits, a nested loop over 256 target agents that compares all of them is stopped after about
# 0.1 s.
MAX_VALUES = 128
MAX_VALUE_CHARS = 4096


# Comments and quoted texts, which contain no names.
_NO_NAMES = re.compile(
    r"""//[^\n]*
    |[rR](?:\"{3}.*?\"{3}|'{3}.*?'{3}|"[^"\n]*"|'[^'\n]*')
    |\"{3}(?:\\.|[^\\])*?\"{3}|'{3}(?:\\.|[^\\])*?'{3}|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'""",
    re.VERBOSE | re.DOTALL,
)
_NAME = re.compile(r"(?<![0-9A-Za-z_])[A-Za-z_][A-Za-z0-9_]*")  # and no part of 1e3, 0x10 or 5u
# What makes a value of a constant, and what it takes.
_CONVERSIONS = {
    "timestamp": 'takes a time in RFC 3339 with Z or an offset, such as timestamp("2026-12-24T00:00:00Z")',
    "duration": 'takes hours, minutes and seconds, such as duration("36h")',
    "int": 'takes a whole number of at most 64 bits, such as int("36")',
    "uint": 'takes a whole number that is not negative, such as uint("36")',
    "double": 'takes a number, such as double("0.5")',
    "bool": 'takes "true" or "false"',
}
# The functions that take a time zone.
_IN_A_ZONE = (
    *("getDate", "getDayOfMonth", "getDayOfWeek", "getDayOfYear", "getFullYear", "getHours", "getMinutes"),
    *("getMonth", "getSeconds", "getMilliseconds"),
)
_CALL = re.compile(rf"\b({'|'.join((*_CONVERSIONS, *_IN_A_ZONE))})\s*(?=\()")
_OFFSET = re.compile(r"[+-]?(?:[01]?[0-9]|2[0-3]):[0-5][0-9]")
# A zone that every time zone database has, and that is not built into the engine.
_A_ZONE = "Etc/GMT"
# A call of matches, with or without a dot before it. The second group is set if its only argument is one
# text.
_MATCHES = re.compile(r"""(\.\s*)?\bmatches\s*\((["\s]+\))?""")
# `parameters` and the member that is read. A call, such as parameters.all(...), reads all members.
_MEMBER = re.compile(r"\bparameters\b(?:\s*\.\s*([A-Za-z_][A-Za-z0-9_]*)\b(?!\s*\())?")

_ERROR = re.compile(r"ERROR: <input>:(-?[0-9]+):(-?[0-9]+): (.*)")
_FUNCTIONS = (
    *("all", "exists", "exists_one", "filter", "has", "map", "size", "contains", "endsWith", "matches"),
    *("startsWith", "duration", "timestamp", "int", "double", "string", "bool", "type", "dyn"),
    *_IN_A_ZONE,
)

# The engine's error messages for a judged condition, and their meanings. The first match wins.
_FAILURES: tuple[tuple[str, str], ...] = (
    ("Iteration budget", "it takes more than 10,000 steps; loop over fewer values."),
    ("Key not found", "it reads a member that is not there{name}; ask for it with has(...) first."),
    ("Index error|index out of", "it reads an item behind the end of a list; ask for its size() first."),
    ("divide by zero|modulus by zero", "it divides by zero."),
    ("overflow|out of range|too big", "a number in it leaves 64 bits."),
    ("o matching overload", "it compares or combines values of kinds that do not go together."),
    ("imestamp|uration", "it reads a text as a time or a duration that is none."),
)


@dataclass(frozen=True, slots=True)
class CelCondition:
    """A checked condition. `members` names the parameters that it reads, or is None if it may read any."""

    text: str
    reads: frozenset[str]
    members: frozenset[str] | None = field(default=None, compare=False, repr=False)
    compiled: Any = field(default=None, compare=False, repr=False)

    def __call__(self, subject: Subject) -> bool:
        """Whether the condition holds. Raises ConditionFailed."""
        try:
            found = self.compiled.eval(data=_facts(subject, self.reads, self.members))
            value = found.value()
        except ConditionFailed:
            raise
        except Exception as exc:  # usually RuntimeError, but the engine does not document its exceptions
            raise ConditionFailed(self._failure(str(exc))) from exc
        if isinstance(value, bool):
            return value
        if str(found.type()) == "ERROR":
            raise ConditionFailed(self._failure(str(value)))
        raise ConditionFailed("it is neither true nor false.")

    def _failure(self, said: str) -> str:
        words = next((words for pattern, words in _FAILURES if re.search(pattern, said)), None)
        # A key is shown only if the condition names it, because other keys may come from a request.
        key = re.search(r'Key not found in map : "(.*)"', said)
        name = f" ({shown(key[1])})" if key and key[1] in self.text else ""
        return (words or "the engine cannot judge it for these values.").format(name=name)


def condition(text: str) -> CelCondition:
    """Compile and check a condition. Raises WrongText."""
    if not text.strip():
        raise WrongText("is empty; write a condition, or remove the key")
    if len(text) > MAX_CHARS:
        raise WrongText(f"has over {MAX_CHARS} characters; make it shorter, or write several rules")
    try:
        from cel_expr_python import cel
    except ImportError as exc:
        raise WrongText("needs the engine for conditions; install it with scopegate[cel]") from exc
    environment = _environment(cel)
    try:
        compiled = environment.compile(text)
    except Exception as exc:
        raise _mistake(text, str(exc)) from exc
    kind = compiled.return_type()
    if kind != cel.Type.BOOL and kind != cel.Type.DYN:
        raise WrongText(f"must come to true or false, not to {str(kind).lower()}; compare it with something")
    names = _NO_NAMES.sub(_blotted, text)
    _check_patterns(text, names, environment)
    _check_constants(text, names)
    members = {found[1] for found in _MEMBER.finditer(names)}
    return CelCondition(
        text=text,
        reads=frozenset(_NAME.findall(names)).intersection(FACTS),
        members=None if None in members else frozenset(members),
        compiled=compiled,
    )


def joint(conditions: Sequence[Condition]) -> Joint | None:
    """Conditions that are judged in one call. The results are those of the conditions one by one.

    Plain conditions are judged without the engine, and all others by one call of it. If one of them cannot be
    judged, it raises ConditionFailed; so it does at a limit that only all of them together exceed. None if
    they cannot be judged together.
    """
    mine = {one.text: one for one in conditions if isinstance(one, CelCondition)}
    if not all(isinstance(one, CelCondition) for one in conditions):
        return None
    plain = {text: expression for text in mine if (expression := _plain.translated(text)) is not None}
    rest = [one for text, one in mine.items() if text not in plain]
    judges = [_plainly(plain)] if plain else []
    if rest:
        listed = _listed(rest) if len(mine) > 1 else None
        if listed is None:
            return None
        judges.append(listed)
    places = {text: place for place, text in enumerate([*plain, *(one.text for one in rest)])}
    order = [places[one.text] for one in conditions]
    if len(judges) == 1 and len(order) == len(places):
        return judges[0]

    def judge(subject: Subject) -> Sequence[bool]:
        found = [result for each in judges for result in each(subject)]
        return [found[place] for place in order]

    return judge


def _plainly(expressions: Mapping[str, str]) -> Joint:
    """Plain conditions, as a function of the facts that they read."""
    words = {name for text in expressions for name in _NAME.findall(_NO_NAMES.sub(_blotted, text))}
    names = [name for name in FACTS if name in words]
    facts = [_INSTANT if name == _plain.NOW else _FACT[name] for name in names]
    function = _plain.function(names, list(expressions.values()))

    def judge(subject: Subject) -> Sequence[bool]:
        values = [fact(subject) for fact in facts]
        for value in values:
            if not _plain.is_plain(value):
                raise ConditionFailed("it reads a value that is not plain.")
        return function(*values)

    return judge


def _listed(conditions: Sequence[CelCondition]) -> Joint | None:
    """Conditions as one list, which the engine evaluates in one call: a call costs more than a condition.

    An error in one of them is an error in the list. None if they make no list of booleans.
    """
    from cel_expr_python import cel

    if any(one.compiled.return_type() != cel.Type.BOOL for one in conditions):
        return None
    try:
        # A line break ends a comment that a condition may end with.
        compiled = _environment(cel).compile("[" + "\n,".join(one.text for one in conditions) + "\n]")
    except Exception:  # too long or too deep; the engine does not document its exceptions
        return None
    reads = frozenset[str]().union(*(one.reads for one in conditions))
    named = [one.members for one in conditions]
    members = None if None in named else frozenset[str]().union(*(one for one in named if one is not None))

    def judge(subject: Subject) -> Sequence[bool]:
        try:
            found = compiled.eval(data=_facts(subject, reads, members)).plain_value()
        except ConditionFailed:
            raise
        except Exception as exc:
            raise ConditionFailed("one of the conditions cannot be judged.") from exc
        # A member of a map may be of any kind, although the engine finds one type when it compiles.
        if type(found) is not list or len(found) != len(conditions) or {*map(type, found)} != {bool}:
            raise ConditionFailed("one of the conditions cannot be judged.")
        return found

    return judge


@lru_cache(maxsize=1)
def _environment(cel: Any) -> Any:
    """The engine with the facts declared. The process shares one, because setting it up takes long."""
    kinds = cel.Type
    declared = dict.fromkeys(FACTS, kinds.STRING)
    for name in ("target_agents", "principal_groups"):
        declared[name] = kinds.List(kinds.STRING)
    declared["parameters"] = kinds.Map(kinds.STRING, kinds.DYN)
    declared["now"] = kinds.TIMESTAMP
    for name in ("max_cost_micros", "attempts_used", "attempts_remaining", "scope_age_seconds"):
        declared[name] = kinds.INT
    return cel.NewEnv(variables=declared)


def _blotted(found: re.Match[str]) -> str:
    """Quotes in place of a text, and blanks in place of a comment. All other positions stay the same."""
    return re.sub(r"[^\n]", " " if found[0].startswith("//") else '"', found[0])


def _check_patterns(text: str, names: str, environment: Any) -> None:
    """Check that regular expressions are constants, because compiling one from a request can take long."""
    for found in _MATCHES.finditer(names):
        message = ""
        if not (found[1] and found[2]):
            message = 'matches(...) takes one text in quotes, as in action.matches("restart_.*")'
        elif str(environment.compile(f"''.matches({text[slice(*found.span(2))]}").eval().type()) == "ERROR":
            message = "matches(...) is given a text that is no regular expression; correct it"
        if message:
            before = names[: found.start() + len(found[1] or "")].split("\n")
            raise WrongText(message, (len(before), len(before[-1]) + 1))


def _check_constants(text: str, names: str) -> None:
    """Check constant arguments, because an invalid one would fail only when a request is judged."""
    for found in _CALL.finditer(names):
        name, inside = found[1], _brackets(names, found.end())
        constant = not set(_NAME.findall(names[inside])) - {"true", "false"}
        given = text[inside]
        message = ""
        if name in _CONVERSIONS:
            if constant and not _is_value(f"{name}({given}\n)"):
                message = _CONVERSIONS[name]
        elif not constant:
            message = f'takes a time zone in quotes, such as {name}("Europe/Berlin"), and nothing else'
        elif not _is_value(f"timestamp(0).{name}({given}\n)"):
            message = _no_zone(name)
        elif names[inside].strip() and not _is_on_a_clock(given):
            message = "takes an offset of at most 23 hours and 59 minutes, such as -08:00"
        if message:
            before = names[: found.start()].split("\n")
            raise WrongText(f"{name}(...) {message}", (len(before), len(before[-1]) + 1))


def _brackets(names: str, opening: int) -> slice:
    """The slice between an opening bracket and its closing bracket."""
    depth = 0
    for place in range(opening, len(names)):
        depth += {"(": 1, ")": -1}.get(names[place], 0)
        if not depth:
            return slice(opening + 1, place)
    raise WrongText("is no condition that the engine can read; close its brackets")


def _no_zone(name: str) -> str:
    if _is_value(f'timestamp(0).getHours("{_A_ZONE}")'):
        return f'takes a time zone, such as {name}("Europe/Berlin") or {name}("-08:00"); this is none'
    return "needs a time zone database, and none is found; install tzdata, set TZDIR, or write an offset"


def _is_on_a_clock(zone: str) -> bool:
    """Whether a zone, as a constant in CEL, is a name or an offset of hours and minutes."""
    from cel_expr_python import cel

    value = _environment(cel).compile(f"({zone}\n)").eval().value()
    return ":" not in value or value[0].isalpha() or bool(_OFFSET.fullmatch(value))


@lru_cache(maxsize=1024)
def _is_value(text: str) -> bool:
    """Whether the engine evaluates a text without any facts. Results are cached, because constants recur."""
    from cel_expr_python import cel

    try:
        return str(_environment(cel).compile(text).eval().type()) != "ERROR"
    except Exception:  # the engine does not document its exceptions
        return False


# Facts for the engine -----------------------------------------------------------------------------------

_FACT: Mapping[str, Callable[[Subject], Any]] = {
    "action": lambda subject: subject.action,
    "risk": lambda subject: "" if subject.risk is None else subject.risk,
    "incident_id": lambda subject: subject.incident_id,
    "tenant_id": lambda subject: subject.tenant_id,
    "principal": lambda subject: subject.principal,
    "principal_kind": lambda subject: subject.principal_kind,
    "principal_groups": lambda subject: list(subject.principal_groups),
    "target_agents": lambda subject: list(subject.target_agents),
    "intent": lambda subject: subject.intent,
    "max_cost_micros": lambda subject: subject.max_cost,
    "attempts_used": lambda subject: subject.attempts_used,
    "attempts_remaining": lambda subject: subject.attempts_remaining,
    "scope_age_seconds": lambda subject: subject.scope_age_seconds,
    "now": lambda subject: to_datetime(subject.now),
}
# `now` for a plain condition, which compares instants.
_INSTANT: Callable[[Subject], Any] = attrgetter("now")


def _facts(subject: Subject, reads: frozenset[str], members: frozenset[str] | None) -> dict[str, Any]:
    """The facts that a condition reads. Raises ConditionFailed if its parameters exceed the limits."""
    known = {name: _FACT[name](subject) for name in reads if name != "parameters"}
    if "parameters" in reads:
        known["parameters"] = _bounded(subject.parameters, members)
    return known


def _bounded(parameters: Mapping[str, Any], members: frozenset[str] | None) -> dict[str, Any]:
    """The parameters that the engine gets. Raises ConditionFailed if they exceed the limits."""
    if members is not None:
        parameters = {name: parameters[name] for name in members if name in parameters}
    return dict(_Handover().mapping(parameters))


class _Handover:
    """Copies values for the engine and counts them.

    A Decimal becomes a double, as the engine has no Decimal.
    """

    def __init__(self) -> None:
        self.values = 0
        self.chars = 0

    def mapping(self, found: Mapping[str, Any]) -> dict[str, Any]:
        return {self.text(key): self.value(value) for key, value in found.items()}

    def value(self, found: Any) -> Any:
        self.values += 1
        if self.values > MAX_VALUES:
            raise ConditionFailed(f"it reads parameters that hold more than {MAX_VALUES} values.")
        if isinstance(found, str):
            return self.text(found)
        if found is None or isinstance(found, bool | int | float):
            return found
        if isinstance(found, Decimal):
            return float(found)
        if isinstance(found, Mapping):
            return self.mapping(found)
        if isinstance(found, list | tuple):
            return [self.value(item) for item in found]
        raise ConditionFailed("it reads parameters that are not JSON values.")

    def text(self, found: Any) -> str:
        if not isinstance(found, str):
            raise ConditionFailed("it reads parameters with a key that is no text.")
        self.chars += len(found)
        if self.chars > MAX_VALUE_CHARS:
            raise ConditionFailed(f"it reads parameters of more than {MAX_VALUE_CHARS} characters.")
        return found


# Mistakes in a text -------------------------------------------------------------------------------------


def _mistake(text: str, said: str) -> WrongText:
    """The first mistake that the engine reports, in the sidecar's own words, with its position."""
    found = _ERROR.search(said)
    if found is None or found[1].startswith("-"):
        if "recursion" in said:
            return WrongText("is nested too deeply; write several rules, or combine fewer values")
        return WrongText("is no condition that the engine can read; write it in CEL")
    lines = text.rstrip().split("\n")
    # If the text ends too early, the position is after its last word.
    line, column = min((int(found[1]), int(found[2])), (len(lines), len(lines[-1]) + 1))
    here = lines[line - 1]
    problem = found[3].removesuffix(" [INVALID_ARGUMENT]")
    unknown = re.match(r"undeclared reference to '(.*?)' ", problem)
    if unknown:
        # The engine points after the name of a function, and at the last dot of a qualified name.
        begins = here.rfind(unknown[1], 0, column - 1 + len(unknown[1]))
        called = here[column - 1 : column] == "("
        return WrongText(_unknown(unknown[1], called), (line, column if begins < 0 else begins + 1))
    return WrongText(_words(problem, here[: column - 1], here[column - 1 :]), (line, column))


def _unknown(name: str, called: bool) -> str:
    if name.lower() in ("and", "or", "not"):
        return _no_operator(name)
    if name in tuple(RiskClass):
        return f'{name} is no fact; write "{name}" in quotes'
    if not called:
        near = did_you_mean(name, FACTS) or f"; the facts are {', '.join(FACTS)}; put text in quotes"
        return f"{shown(name)} is no fact{near}"
    if name in _FUNCTIONS:
        return f"{name}(...) does not take this; compare CEL's description of it"
    return f"{shown(name)}(...) is no function of conditions{did_you_mean(name, _FUNCTIONS)}"


def _words(problem: str, before: str, rest: str) -> str:
    """The engine's problem in the sidecar's own words. `before` and `rest` split the line at its position."""
    overload = re.match(r"found no matching overload for '(.*)' applied to '(.*)'", problem)
    if overload:
        sign = overload[1] if overload[1].isalpha() else re.sub("[_@]", "", overload[1])
        return f"{sign} does not work on {_kinds(overload[2])}; use values of kinds that go together"
    selected = re.match(r"expression of type '(.*)' cannot be the operand of a select", problem)
    if selected:
        return f"a value of the type {_kinds(selected[1])} has no members; remove the name behind the dot"
    if problem.startswith("Syntax error"):
        word = re.match(r"(?i:and|or|not)\b", rest) or re.search(r"\b(?i:and|or|not)(?=\s*$)", before)
        if word:
            return _no_operator(word[0])
        if not rest.strip():
            return "ends too early; complete it, and close its brackets and quotes"
        if rest.startswith(("'", '"')) and "token recognition" in problem:
            return "the quoted text that begins here is never closed; add the quote"
        if re.match(r"=(?!=)", rest):
            return "= is no comparison; write == for equal"
        return "cannot be read from here on; check the brackets, quotes and operators before it"
    if "has() argument" in problem:
        return "has(...) takes one member, such as has(parameters.name)"
    if "reserved identifier" in problem:
        return "is a reserved word of CEL; use another name"
    if re.match(r"(?i:invalid (string|bytes) literal)", problem):
        return "is no text that CEL reads; write each backslash twice"
    if "literal" in problem:
        return "is no number of at most 64 bits; write a smaller one"
    return f"cannot be used ({shown(problem, 120)})"


def _no_operator(word: str) -> str:
    return f"{word} is no operator of conditions; write && for and, || for or, ! for not"


def _kinds(said: str) -> str:
    return shown(re.sub(r"google\.protobuf\.(\w+)", lambda found: found[1].lower(), said))

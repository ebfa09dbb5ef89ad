"""Reads policies from files. A mistake in one file makes the whole folder unusable.

The files `policies/*.yaml`, in name order, become one immutable `PolicySet` with the actions and rules of all
files. The name of an action and the id of a rule are unique over all files. Two globs of the catalogue are a
mistake if it is not clear which one decides. A rule for actions that no scope can name is a mistake, too,
because a brake with a misspelled action would look effective.
"""

from __future__ import annotations

import hashlib
import re
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sidecar.core.facts import IDENTIFIER_RULE, is_identifier
from sidecar.core.globs import GlobIndex, globbed, is_glob, literal_prefix
from sidecar.core.policy import ActionPolicy, PolicySet, Rule
from sidecar.core.roles import ROLES, Holders, Role, Roles
from sidecar.files.faults import ConfigurationError, Fault
from sidecar.files.yamlfile import Document, KeyPath, contents, did_you_mean, in_order, survey
from sidecar.policies._conditions import joint
from sidecar.policies._sections import ActionSection, HoldersSection, PolicyFile, RuleSection, contradictions
from sidecar.settings.faults import Mistake, faults, validated

UNLISTED = "*"
# Finding the nearest of thousands of actions takes long. With more mistakes than this, spelling is not the
# cause.
MAX_SUGGESTIONS = 20

# A large set is read while the same process serves requests, so the reader pauses after this number of rules.
# Compiling a condition takes as long as reading several rules without one.
RULES_IN_A_ROW = 50
CONDITION_IN_RULES = 5
TURN_SECONDS = 0.0002

_VARIABLE = re.compile(r"\$\{[A-Za-z_][A-Za-z0-9_]*[:}]")


def load(folder: Path) -> PolicySet:
    """The policy set that a folder holds. Raises ConfigurationError with the faults of all files."""
    found = _Set()
    digest = hashlib.sha256()
    complete = True
    for path in _files(folder):
        try:
            raw = contents(path)
        except ConfigurationError as exc:
            found.faults += exc.faults
            complete = False
            continue
        # The parts are length-prefixed, so that no two different folders feed the same bytes to the hash.
        for part in (path.name.encode("utf-8", "surrogateescape"), raw):
            digest.update(len(part).to_bytes(8, "big") + part)
        if not raw.strip():
            # A full disk leaves an empty file, and so does a writer that has just begun.
            found.faults.append(Fault(str(path), "", "is empty; remove the file if that is intended"))
            complete = False
            continue
        document, broken = survey(raw, str(path))
        found.faults += broken
        if document is None:
            complete = False
        else:
            found.read(document)
    if not found.faults and not found.named:
        message = "no file lists an action, so every request would be refused; list some under actions:"
        found.faults.append(Fault(str(folder), "actions", message))
    # The actions of an unreadable file are unknown, and "*" lists all actions. Neither allows the check.
    if complete and found.named and UNLISTED not in found.named:
        found.check_globs()
    if found.faults:
        raise ConfigurationError(in_order(found.faults))
    unlisted = found.actions.pop(UNLISTED, None)
    return PolicySet(
        revision=digest.hexdigest()[:16],
        actions={name: entry for name, entry in found.actions.items() if not is_glob(name)},
        globs={name: entry for name, entry in found.actions.items() if is_glob(name)},
        unlisted=unlisted,
        rules=tuple(found.rules),
        roles=Roles(found.roles),
        join=joint,
    )


def _files(folder: Path) -> list[Path]:
    """The folder's YAML files in name order, without folders and hidden files (a ConfigMap's `..data`)."""
    try:
        files = [
            path
            for path in sorted(folder.iterdir(), key=lambda path: path.name)
            if path.suffix in (".yaml", ".yml") and not path.name.startswith(".") and not path.is_dir()
        ]
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        closed = isinstance(exc, PermissionError)
        advice = "let the sidecar read and enter it" if closed else "create it, or correct the key policies"
        message = f"the policies folder cannot be read ({reason}); {advice}"
        raise ConfigurationError([Fault(str(folder), "", message)]) from exc
    if not files:
        message = "contains no *.yaml file; add one with actions:, such as the shipped policies/actions.yaml"
        raise ConfigurationError([Fault(str(folder), "", message)])
    return files


def _with_variables(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    """The paths of keys and texts that name a variable, which only the configuration may do."""
    if isinstance(value, dict):
        for key, below in value.items():
            if _VARIABLE.search(key):
                yield (*path, key)
            else:
                yield from _with_variables(below, (*path, key))
    elif isinstance(value, list):
        for number, below in enumerate(value):
            yield from _with_variables(below, (*path, number))
    elif isinstance(value, str) and _VARIABLE.search(value):
        yield path


class _Set:
    """Collects the actions, rules and faults of all files."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.actions: dict[str, ActionPolicy] = {}
        self.rules: list[Rule] = []
        self.roles: dict[Role, Holders] = {}
        self._role_places: dict[Role, str] = {}
        # The places of all names, valid or not, so that one is reported if it stands twice.
        self.named: dict[str, str] = {}
        self._ids: dict[str, str] = {}
        # The globs of the catalogue by what decides between them: the literal prefix, and the length.
        self._ranks: dict[tuple[str, int], str] = {}
        # The globs on actions, checked once the catalogue is complete.
        self._globs: list[tuple[Document, KeyPath, str]] = []
        self._in_a_row = 0

    def read(self, document: Document) -> None:
        """Add the actions and rules of one file."""
        top = document.value
        if top is None:
            return
        if "${" in document.source:
            message = "variables are not substituted in policies; write the value"
            self._wrong(document, (), (Mistake(path, message) for path in _with_variables(top, ())))
        _, mistakes = validated(PolicyFile, top)
        self._wrong(document, (), mistakes)
        # A mistake in one of the two does not hide those in the other.
        actions, rules, roles = (
            top.get(key) if isinstance(top, dict) else None for key in ("actions", "rules", "roles")
        )
        for name, value in actions.items() if isinstance(actions, dict) else ():
            self._action(document, name, value)
        for number, value in enumerate(rules if isinstance(rules, list) else ()):
            self._rule(document, ("rules", number), value)
        for name, value in roles.items() if isinstance(roles, dict) else ():
            self._role(document, name, value)

    def check_globs(self) -> None:
        """Report the globs that match no action of the catalogue."""
        names = sorted(name for name in self.named if not is_glob(name))
        listed = GlobIndex(name for name in self.named if is_glob(name))
        suggestions = 0
        for document, path, glob in self._globs:
            if not _matches_any(glob, names) and not listed.overlaps(glob):
                suggestions += 1
                near = did_you_mean(glob, names) if suggestions <= MAX_SUGGESTIONS else ""
                message = f"matches no action of the catalogue{near or '; correct it, or list the action'}"
                self._wrong(document, path, [Mistake((), message)])

    def _wrong(self, document: Document, above: KeyPath, mistakes: Iterable[Mistake]) -> None:
        self.faults += faults(document, mistakes, above)

    def _action(self, document: Document, name: str, value: Any) -> None:
        path = ("actions", name)
        section, mistakes = validated(ActionSection, value)
        if not is_identifier(name):
            mistakes.append(Mistake((), f"the name of an action is {IDENTIFIER_RULE}"))
        if name in self.named:
            mistakes.append(Mistake((), f"is already at {self.named[name]}; keep one of them"))
        elif is_glob(name) and name != UNLISTED:
            rank = literal_prefix(name), len(name)
            other = self._ranks.setdefault(rank, name)
            if other != name:
                message = (
                    f"begins like {other} at {self.named[other]} and is as long, so neither decides before "
                    "the other; name the actions, or make one glob longer"
                )
                mistakes.append(Mistake((), message))
        self.named.setdefault(name, document.place(path))
        self._wrong(document, path, mistakes)
        if section is not None:
            self.actions[name] = section.policy()

    def _role(self, document: Document, name: str, value: Any) -> None:
        path = ("roles", name)
        section, mistakes = validated(HoldersSection, value)
        role = next((role for role in ROLES if role == name), None)
        if role is None:
            mistakes.append(
                Mistake((), f"is not a role{did_you_mean(name, ROLES)}; roles are {', '.join(ROLES)}")
            )
        elif role in self._role_places:
            mistakes.append(
                Mistake((), f"is already at {self._role_places[role]}; put all its holders there")
            )
        else:
            self._role_places[role] = document.place(path)
        self._wrong(document, path, mistakes)
        if section is not None and role is not None:
            self.roles[role] = section.holders()

    def _rule(self, document: Document, path: KeyPath, value: Any) -> None:
        section, mistakes = validated(RuleSection, value)
        if isinstance(value, dict):
            mistakes += contradictions(value)
            rule_id: Any = value.get("id")
            if is_identifier(rule_id):
                if rule_id in self._ids:
                    message = f"is already at {self._ids[rule_id]}; give each rule its own id"
                    mistakes.append(Mistake(("id",), message))
                self._ids.setdefault(rule_id, document.place((*path, "id")))
            self._globs += ((document, (*path, *below), glob) for below, glob in _action_globs(value))
            self._give_way(CONDITION_IN_RULES if "when" in value else 1)
        if section is not None and not mistakes:
            self.rules.append(section.rule())
        self._wrong(document, path, mistakes)

    def _give_way(self, rules: int) -> None:
        self._in_a_row += rules
        if self._in_a_row >= RULES_IN_A_ROW:
            self._in_a_row = 0
            time.sleep(TURN_SECONDS)


def _action_globs(rule: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """The globs on actions of a rule as the file has it, with their paths below it."""
    match = rule.get("match")
    globs = match.get("action") if isinstance(match, dict) else None
    if isinstance(globs, list):
        found: Iterable[tuple[KeyPath, Any]] = (
            (("match", "action", number), glob) for number, glob in enumerate(globs)
        )
    else:
        found = [(("match", "action"), globs)]
    return ((path, glob) for path, glob in found if is_identifier(glob))


def _matches_any(glob: str, names: list[str]) -> bool:
    """Whether a glob matches one of the sorted names. Only names with its literal prefix are tested."""
    plain = re.split(r"[*?\[]", glob, maxsplit=1)[0]
    for number in range(bisect_left(names, plain), len(names)):
        name = names[number]
        if not name.startswith(plain):
            break
        if name == glob or glob == plain + "*" or (glob != plain and globbed((glob,), name)):
            return True
    return False

"""Reading policies from files. A mistake in one file makes the whole folder unusable.

The files `policies/*.yaml`, in name order, become one immutable `PolicySet` with the actions and rules of all
files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidecar.core.facts import is_identifier
from sidecar.core.policy import ActionPolicy, PolicySet, RiskClass
from sidecar.files.faults import ConfigurationError, Fault
from sidecar.files.yamlfile import Document, KeyPath, contents, in_order, survey
from sidecar.policies.rules import IDENTIFIER, RISKS, Entry, Rules
from sidecar.settings.values import MAX_SECONDS, kind

UNLISTED = "*"

_VARIABLE = re.compile(r"\$\{[A-Za-z_][A-Za-z0-9_]*[:}]")

_TOP_KEYS = ("actions", "rules")
_ACTION_KEYS = ("risk", "max_cost_usd", "timeout_seconds", "targets_required")


def load(folder: Path) -> PolicySet:
    """The policy set that a folder holds. Raises ConfigurationError with the faults of all files."""
    faults: list[Fault] = []
    catalogue, rules = _Catalogue(faults), Rules(faults)
    digest = hashlib.sha256()
    complete = True
    for path in _files(folder):
        try:
            raw = contents(path)
        except ConfigurationError as exc:
            faults += exc.faults
            complete = False
            continue
        # The parts are length-prefixed, so that no two different folders feed the same bytes to the hash.
        for part in (path.name.encode("utf-8", "surrogateescape"), raw):
            digest.update(len(part).to_bytes(8, "big") + part)
        if not raw.strip():
            # A full disk leaves an empty file, and so does a writer that has just begun.
            faults.append(Fault(str(path), "", "holds nothing; remove the file if that is meant"))
            complete = False
            continue
        document, found = survey(raw, str(path))
        faults += found
        if document is None:
            complete = False
        else:
            _read(document, catalogue, rules)
    if not faults and not catalogue.places:
        message = "no file here names an action, so everything would be refused; list some under actions:"
        faults.append(Fault(str(folder), "actions", message))
    # The actions of an unreadable file are unknown, and "*" lists all actions. Neither allows the check.
    if complete and catalogue.places and UNLISTED not in catalogue.places:
        rules.check_actions(catalogue.places)
    if faults:
        raise ConfigurationError(in_order(faults))
    unlisted = catalogue.actions.pop(UNLISTED, None)
    return PolicySet(
        revision=digest.hexdigest()[:16],
        actions=catalogue.actions,
        unlisted=unlisted,
        rules=tuple(rules.found),
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
        message = "holds no *.yaml file; add one with actions:, such as the shipped policies/actions.yaml"
        raise ConfigurationError([Fault(str(folder), "", message)])
    return files


def _read(document: Document, catalogue: _Catalogue, rules: Rules) -> None:
    """Add the actions and rules of one file."""
    top = document.value
    if top is None:
        return
    file = Entry(document, (), top, catalogue.faults)
    if "${" in document.source:
        for path in _with_variables(top, ()):
            file.fault(path, "variables are not filled in here; write the value")
    if not isinstance(top, dict):
        file.fault((), f"expects the keys actions: and rules: on top, found {kind(top)}")
        return
    file.check_keys(_TOP_KEYS)
    if top.get("actions") is not None:
        catalogue.add(file, top["actions"])
    if top.get("rules") is not None:
        rules.add(file, top["rules"])


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


@dataclass(slots=True)
class _Catalogue:
    """Collects the actions of all files. Mistakes go to `faults`."""

    faults: list[Fault]
    actions: dict[str, ActionPolicy] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def add(self, file: Entry, actions: Any) -> None:
        """Add the actions under `actions:` in one file."""
        if not isinstance(actions, dict):
            file.fault(("actions",), f"expects a map of actions, found {kind(actions)}")
            return
        for name, value in actions.items():
            self._add(file, name, value)

    def _add(self, file: Entry, name: str, value: Any) -> None:
        path = ("actions", name)
        if not is_identifier(name):
            file.fault(path, f"the name of an action is {IDENTIFIER}")
        elif name != UNLISTED and any(character in name for character in "*?["):
            file.fault(path, 'patterns are refused; name each action, or "*" for all that are not listed')
        if name in self.places:
            file.fault(path, f"stands in {self.places[name]}, too; keep one of them")
        self.places.setdefault(name, file.document.place(path))
        entry = Entry.of(file.document, path, value, self.faults, keys=_ACTION_KEYS, example="{risk: low}")
        if entry is None:
            return
        risk = entry.choice("risk", RISKS)
        hold = entry.micros("max_cost_usd")
        timeout = entry.seconds("timeout_seconds", MAX_SECONDS)
        targets = entry.flag("targets_required")
        if risk is not None:
            self.actions[name] = ActionPolicy(
                risk=RiskClass(risk), hold=hold or 0, timeout_seconds=timeout, targets_required=targets
            )

"""Policies from files: read as a whole or not at all. A mistake in one file leaves no set, never half a set.

`policies/*.yaml`, in name order, become one immutable `PolicySet`. What a later release brings (rules) is
refused by name: a rule that were skipped in silence would be a hole that nobody sees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from sidecar.configvalues import LATER, MAX_SECONDS, kind, micros_of
from sidecar.core.facts import MAX_ID_CHARS, is_identifier
from sidecar.core.policy import ActionPolicy, PolicySet, RiskClass
from sidecar.errors import ConfigurationError, Fault
from sidecar.yamlfile import Document, KeyPath, contents, did_you_mean, dotted, in_order, survey

UNLISTED = "*"

_RISKS = tuple(risk.value for risk in RiskClass)
_TOP_KEYS = ("actions",)
_TOP_KEYS_LATER = ("rules",)
_ACTION_KEYS = ("risk", "max_cost_usd", "timeout_seconds")
_ACTION_KEYS_LATER = ("targets_required",)


def load(folder: Path) -> PolicySet:
    """The policy set that a folder holds. Raises ConfigurationError with the faults of all files."""
    catalogue = _Catalogue()
    digest = hashlib.sha256()
    for path in _files(folder):
        try:
            raw = contents(path)
        except ConfigurationError as exc:
            catalogue.faults += exc.faults
            continue
        # Length-prefixed, so that no two different folders feed the same bytes to the hash.
        for part in (path.name.encode("utf-8", "surrogateescape"), raw):
            digest.update(len(part).to_bytes(8, "big") + part)
        document, faults = survey(raw, str(path))
        catalogue.faults += faults
        if document is not None:
            catalogue.add(document)
    if not catalogue.faults and not catalogue.places:
        message = "no file here names an action, so everything would be refused; list some under actions:"
        catalogue.faults.append(Fault(str(folder), "actions", message))
    if catalogue.faults:
        raise ConfigurationError(in_order(catalogue.faults))
    unlisted = catalogue.actions.pop(UNLISTED, None)
    return PolicySet(revision=digest.hexdigest()[:16], actions=catalogue.actions, unlisted=unlisted)


def _files(folder: Path) -> list[Path]:
    """The folder's YAML files in name order; hidden ones (a ConfigMap's `..data`) and folders are not."""
    try:
        entries = sorted(folder.iterdir(), key=lambda path: path.name)
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        message = f"the policies folder cannot be read ({reason}); create it, or correct the key policies"
        raise ConfigurationError([Fault(str(folder), "", message)]) from exc
    files = [
        path
        for path in entries
        if path.suffix in (".yaml", ".yml") and not path.name.startswith(".") and not path.is_dir()
    ]
    if not files:
        message = "holds no *.yaml file; add one with actions:, such as the shipped policies/actions.yaml"
        raise ConfigurationError([Fault(str(folder), "", message)])
    return files


@dataclass(slots=True)
class _Catalogue:
    """The actions of all files as they are read, and every fault on the way."""

    actions: dict[str, ActionPolicy] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def add(self, document: Document) -> None:
        top = document.value
        if top is None:
            return
        if not isinstance(top, dict):
            self._fault(document, (), f"expects the key actions: on top, found {kind(top)}")
            return
        self._check_keys(document, (), top, _TOP_KEYS, _TOP_KEYS_LATER)
        actions = top.get("actions")
        if isinstance(actions, dict):
            for name, entry in actions.items():
                self._add_action(document, name, entry)
        elif actions is not None:
            self._fault(document, ("actions",), f"expects a map of actions, found {kind(actions)}")

    def _add_action(self, document: Document, name: str, entry: Any) -> None:
        path = ("actions", name)
        if not is_identifier(name):
            self._fault(document, path, f"the name of an action is 1 to {MAX_ID_CHARS} printable characters")
        elif name != UNLISTED and any(character in name for character in "*?["):
            self._fault(
                document, path, 'patterns are refused; name each action, or "*" for all that are not listed'
            )
        if name in self.places:
            self._fault(document, path, f"stands in {self.places[name]}, too; keep one of them")
        self.places.setdefault(name, document.place(path))
        if not isinstance(entry, dict):
            self._fault(document, path, f"expects a map such as {{risk: low}}, found {kind(entry)}")
            return
        self._check_keys(document, path, entry, _ACTION_KEYS, _ACTION_KEYS_LATER)
        risk = self._risk(document, path, entry)
        hold = self._hold(document, path, entry)
        timeout = self._timeout(document, path, entry)
        if risk is not None:
            self.actions[name] = ActionPolicy(risk=risk, hold=hold, timeout_seconds=timeout)

    def _risk(self, document: Document, path: KeyPath, entry: Mapping[str, Any]) -> RiskClass | None:
        if "risk" not in entry:
            self._fault(document, (*path, "risk"), f"is required; add one of {', '.join(_RISKS)}")
        elif entry["risk"] not in _RISKS:
            near = did_you_mean(entry["risk"], _RISKS) if isinstance(entry["risk"], str) else ""
            self._fault(document, (*path, "risk"), f"expects one of {', '.join(_RISKS)}{near}")
        else:
            return RiskClass(entry["risk"])
        return None

    def _hold(self, document: Document, path: KeyPath, entry: Mapping[str, Any]) -> int:
        if "max_cost_usd" not in entry:
            return 0
        try:
            return micros_of(entry["max_cost_usd"])
        except ValueError as exc:
            self._fault(document, (*path, "max_cost_usd"), str(exc))
            return 0

    def _timeout(self, document: Document, path: KeyPath, entry: Mapping[str, Any]) -> float | None:
        if "timeout_seconds" not in entry:
            return None
        seconds = entry["timeout_seconds"]
        here = (*path, "timeout_seconds")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            self._fault(document, here, f"expects a number of seconds, found {kind(seconds)}")
        elif not 0 < seconds <= MAX_SECONDS or not isfinite(seconds):
            self._fault(document, here, f"must be above 0 and at most {MAX_SECONDS}")
        else:
            return float(seconds)
        return None

    def _check_keys(
        self,
        document: Document,
        path: KeyPath,
        found: Mapping[str, Any],
        known: tuple[str, ...],
        later: tuple[str, ...],
    ) -> None:
        for key in found:
            if key in later:
                self._fault(document, (*path, key), f"is {LATER}; remove it")
            elif key not in known:
                self._fault(document, (*path, key), f"is not a known key{did_you_mean(key, known)}")

    def _fault(self, document: Document, path: KeyPath, message: str) -> None:
        """Records a fault, unless the place was found faulty as YAML already."""
        if not document.is_broken(path):
            self.faults.append(Fault(document.place(path), dotted(path), message))

"""The stores of a program that embeds Scopegate: no sidecar process, the same store, log and core."""

from __future__ import annotations

import atexit
import os
import threading
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from sidecar.core.policy import ActionPolicy, PolicySet, RiskClass
from sidecar.errors import StoreUnavailable
from sidecar.library.threaded import OPEN_SECONDS, Library
from sidecar.policies import files as policyfiles
from sidecar.settings.sections import Care
from sidecar.settings.sections import Store as StoreSettings
from sidecar.settings.values import sentence

__all__ = ["Library", "configure", "library", "opened"]

MEMORY = "memory://"
DEADLINE_SECONDS = 2.0
MIN_CONFIDENCE = 0.50

# Without policy files the scope alone decides, as in the system that the library stands in for.
UNRESTRICTED = PolicySet(revision="none", actions={}, unlisted=ActionPolicy(risk=RiskClass.LOW))

_choosing = threading.RLock()
_libraries: dict[str, Library] = {}
_configured: Library | None = None


def configure(
    store_url: str = MEMORY,
    *,
    policies: str | os.PathLike[str] | None = None,
    deadline_seconds: float = DEADLINE_SECONDS,
    min_confidence: float = MIN_CONFIDENCE,
) -> None:
    """Name the store of this program, and open it; the one before is closed. The same file again stays open
    and takes the new terms. Change to another only while no action runs, or its end finds its store closed.

    `store_url` is `memory://` (forgotten at exit), or `sqlite:///file.db` (relative to the working folder) or
    `sqlite:////absolute/file.db`, which one process owns at a time. `policies` is a folder of policy files;
    without one, scopes alone decide. `deadline_seconds` is how long a call may wait for the store.

    Raises ValueError for a wrong value, ConfigurationError for policies that cannot be used, and
    StoreUnavailable, naming the cause, where the store cannot be opened; later calls then try again.
    """
    global _configured
    chosen = Library(
        _store_settings(store_url, deadline_seconds),
        policies=UNRESTRICTED if policies is None else policyfiles.load(Path(policies)),
        min_confidence=_confidence(min_confidence),
    )
    with _choosing:
        current = _libraries.get(chosen.url)
        if current is not None and chosen.url != MEMORY:
            # What runs on it goes on; closing it would leave its executions without their end.
            current.adjust(
                policies=chosen.policies, deadline_seconds=deadline_seconds, min_confidence=min_confidence
            )
            chosen = current
        before, _configured = _configured, chosen
        _libraries[chosen.url] = chosen
        given_up = {before, current} - {None, chosen}
        for each in given_up:
            assert each is not None
            if _libraries.get(each.url) is each:
                del _libraries[each.url]
    for each in given_up:
        assert each is not None
        each.close()
    chosen.open(OPEN_SECONDS)


def library() -> Library:
    """The configured store; one in memory where none was configured."""
    global _configured
    with _choosing:
        if _configured is None:
            _configured = opened(MEMORY)
        return _configured


def opened(store_url: str) -> Library:
    """The store of this URL, shared by everybody in this process who names it. Raises ValueError."""
    store = _store_settings(store_url, DEADLINE_SECONDS)
    with _choosing:
        return _libraries.setdefault(
            store.url, Library(store, policies=UNRESTRICTED, min_confidence=MIN_CONFIDENCE)
        )


def _store_settings(store_url: str, deadline_seconds: float) -> StoreSettings:
    try:
        return StoreSettings.model_validate(
            {"url": store_url, "deadline_seconds": deadline_seconds}, context={"folder": Path.cwd()}
        )
    except ValidationError as exc:
        error = exc.errors(include_url=False)[0]
        name = {"url": "store_url"}.get(str(error["loc"][0]), error["loc"][0])
        raise ValueError(f"{name} {sentence(dict(error))}") from exc


def _confidence(value: float) -> float:
    try:
        return Care.model_validate({"min_confidence": value}).min_confidence
    except ValidationError as exc:
        raise ValueError(f"min_confidence {sentence(dict(exc.errors(include_url=False)[0]))}") from exc


def _close_all() -> None:
    """At the end of the program. Its daemon threads still run then; nobody waits for them."""
    for each in list(_libraries.values()):
        with suppress(StoreUnavailable):
            each.close()


def _after_fork() -> None:
    global _choosing
    _choosing = threading.RLock()
    for each in _libraries.values():
        each.abandon()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_after_fork)

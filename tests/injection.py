"""Faults at every place where one execution may fail: each call of a coroutine, each await of the gate.

Nothing is listed by name. Every coroutine method of the classes below is a place when it is called, and those
of what remembers are a second one when they return: what was written, and its answer is lost. Each suspension
of an execution's task is one more. A first run counts them; then one run for each place fails, hangs, is
cancelled or is killed there. So what is awaited tomorrow is covered tomorrow.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import types
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Literal
from unittest import mock

from sidecar.errors import StoreUnavailable
from sidecar.gate.execution import Gate
from sidecar.gate.messages import Remainder
from sidecar.gate.refusal_log import RefusalLog
from sidecar.gate.settlement import Settlements
from sidecar.store.batch import Store
from sidecar.store.sqlite import SqliteEngine
from sidecar.upstream import Exchange, Upstream
from sidecar.upstream._exchange import UpstreamConnection

REMEMBER = (SqliteEngine, Store, Settlements, RefusalLog)
CLASSES = (*REMEMBER, Gate, Upstream, Exchange, UpstreamConnection, Remainder)
# The loop of the store's writer: it runs from the start to the end, so it is no place in an execution, and
# what goes on inside is behind the calls of the engine.
WRITER = (
    "_write",
    "_commit",
    "_failed",
    "_read_head",
    "_known_head",
    "_rehearse",
    "_keep",
    "_tidy",
    "_transact",
    "_close",
)
WAITS = "an execution waits"
KILLED = 9

Fault = BaseException | Literal["hang", "kill"]


@dataclass
class Injection:
    """One house's faults: the `at`th place that is met while it is armed has the fault, and no other."""

    at: int = 0
    fault: Fault | None = None
    armed: bool = False
    met: list[str] = field(default_factory=list)
    fired: asyncio.Event = field(default_factory=asyncio.Event)
    free: asyncio.Event = field(default_factory=asyncio.Event)  # of what hangs

    def arm(self, at: int, fault: Fault | None) -> None:
        self.at, self.fault, self.armed, self.met = at, fault, True, []
        self.fired, self.free = asyncio.Event(), asyncio.Event()

    def disarm(self) -> None:
        self.armed = False
        self.free.set()

    def here(self, place: str) -> Fault | None:
        """The fault of this place, which is met now."""
        if not self.armed:
            return None
        self.met.append(place)
        if len(self.met) - 1 != self.at or self.fault is None:
            return None
        if isinstance(self.fault, asyncio.CancelledError) and not in_an_execution():
            return None  # the gate cancels executions, and nothing else of its own
        if isinstance(self.fault, StoreUnavailable) and place.endswith("returns") and "Engine" not in place:
            return None  # the store says so only of what is not committed, or will be told
        if isinstance(self.fault, StoreUnavailable) and place == WAITS:
            return None
        self.fired.set()
        if self.fault == "kill":
            os._exit(KILLED)
        return self.fault

    async def pass_by(self, place: str) -> None:
        fault = self.here(place)
        if isinstance(fault, BaseException):
            raise fault
        if fault is not None:
            await self.free.wait()


# Of the house that a task belongs to: all that it starts inherits it.
INJECTION: ContextVar[Injection] = ContextVar("injection")


def in_an_execution() -> bool:
    task = asyncio.current_task()
    return task is not None and task.get_name() == "scopegate-execution"


def _guarded(
    name: str, remembers: bool, method: Callable[..., Coroutine[Any, Any, Any]]
) -> Callable[..., Any]:
    @wraps(method)
    async def guarded(*args: Any, **options: Any) -> Any:
        injection = INJECTION.get(None)
        if injection is None:
            return await method(*args, **options)
        await injection.pass_by(f"{name} is called")
        if name == "Gate._execute":
            result = await _stepped(method(*args, **options), injection)
        else:
            result = await method(*args, **options)
        if remembers:
            await injection.pass_by(f"{name} returns")
        return result

    return guarded


@types.coroutine
def _stepped(inner: Coroutine[Any, Any, Any], injection: Injection) -> Generator[Any, Any, Any]:
    """Run a coroutine step by step, with each of its suspensions as a place."""
    thrown: BaseException | None = None
    while True:
        try:
            awaited = inner.send(None) if thrown is None else inner.throw(thrown)
        except StopIteration as end:
            return end.value
        thrown = None
        fault = injection.here(WAITS)
        if isinstance(fault, BaseException):
            # An await fails because what is awaited does, and what that set up is taken down before.
            if isinstance(awaited, asyncio.Task) or awaited is None:
                thrown = fault
                continue
            if isinstance(fault, asyncio.CancelledError):
                awaited.cancel()
            else:
                awaited.set_exception(fault)
        try:
            if fault == "hang":
                yield from injection.free.wait().__await__()
            yield awaited
        except BaseException as exc:
            thrown = exc


def places_of(cls: type) -> Iterator[str]:
    for name, member in vars(cls).items():
        if inspect.iscoroutinefunction(member) and not (cls is Store and name in WRITER):
            yield name


@contextmanager
def everywhere() -> Iterator[None]:
    """Make every coroutine method of the classes a place, for houses that are opened inside."""
    patches = [
        mock.patch.object(cls, name, _guarded(f"{cls.__name__}.{name}", cls in REMEMBER, getattr(cls, name)))
        for cls in CLASSES
        for name in places_of(cls)
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()

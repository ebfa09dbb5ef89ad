"""The store and the policies of a program that embeds Scopegate. It needs no sidecar process, and uses the
same store, log and core.

The store runs on a daemon thread with its own event loop. So it works from any thread, inside and outside a
running loop. Callers wait for it with a deadline.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

from sidecar.clock import wall_clock
from sidecar.core.command import Admitted, Command, Reply, Settled
from sidecar.core.policy import ActionPolicy, PolicySet, RiskClass
from sidecar.errors import StoreClosed, StoreUnavailable
from sidecar.gate.settlement import Settlements
from sidecar.policies import files as policyfiles
from sidecar.settings.faults import validated
from sidecar.settings.sections import Care
from sidecar.settings.sections import Store as StoreSettings
from sidecar.store.base import Engine
from sidecar.store.batch import Store
from sidecar.store.crash import account_for_crash
from sidecar.store.sqlite import SqliteEngine
from sidecar.telemetry.metrics import Metrics

T = TypeVar("T")

# How long the thread may take beyond the store's own deadline before it counts as hanging.
GRACE_SECONDS = 1.0
# The time limit of closing, and of opening, which may have to migrate a large database.
OPEN_SECONDS = 30.0

Ending = Literal["answered", "not_sent", "unknown"]

# References to the parent's objects in a forked child, which keep them from being destroyed there.
_of_parents: list[object] = []


class Library:
    """One store, opened on first use. A call that fails raises StoreUnavailable, naming the cause."""

    def __init__(
        self,
        store: StoreSettings,
        *,
        policies: PolicySet,
        min_confidence: float,
    ) -> None:
        self.url = store.url
        self.policies = policies
        self.min_confidence = min_confidence
        self._file = store.file
        self._deadline = store.deadline_seconds
        self._opening = threading.Lock()
        self._under_way: Future[None] | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine: SqliteEngine | None = None
        self._store: Store | None = None
        self._settlements: Settlements | None = None
        self._closed = False

    # Opening and closing ---------------------------------------------------------------------------

    def open(self, seconds: float | None = None) -> None:
        """Open the store if it is not open yet. Raises the failure; the next use tries again.

        The caller waits at most `seconds` (None: as long as any call). After that the opening goes on.
        """
        if self._store is not None:
            return
        with self._opening:
            if self._closed:
                raise StoreClosed("this store was closed, because another one was configured in its place")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=_run, args=(self._loop,), name="scopegate-library", daemon=True
                )
                self._thread.start()
            if self._under_way is None:
                self._under_way = self._begin(self._open())
            under_way = self._under_way
        try:
            self._wait(under_way, self._patience if seconds is None else seconds)
        finally:
            with self._opening:
                if under_way.done() and self._under_way is under_way:
                    self._under_way = None

    async def _open(self) -> None:
        metrics = Metrics()
        engine = SqliteEngine(self._file)
        store = Store(engine, clock=wall_clock, deadline_seconds=self._deadline, observer=metrics)
        try:
            await store.open()
            await account_for_crash(store, "library")
        except BaseException:
            await store.close()
            raise
        self._engine, self._settlements, self._store = engine, Settlements(store, metrics, "library"), store

    def close(self) -> None:
        """Commit the waiting commands, close the store and end its thread. Later calls raise StoreClosed."""
        with self._opening:
            self._closed = True
            loop, under_way = self._loop, self._under_way
        if loop is None:
            return
        if under_way is not None:
            with suppress(Exception):
                self._wait(under_way, OPEN_SECONDS)
        store, settlements = self._store, self._settlements
        self._loop = self._engine = self._store = self._settlements = None

        async def last_words() -> None:
            if store is not None and settlements is not None:
                await settlements.close()
                await store.close()
            # Callers that still wait get a reply, or an exception, before the loop ends.
            waiting = asyncio.all_tasks() - {asyncio.current_task()}
            for late in (await asyncio.wait(waiting, timeout=GRACE_SECONDS))[1] if waiting else ():
                late.cancel()

        try:
            self._wait(asyncio.run_coroutine_threadsafe(last_words(), loop), OPEN_SECONDS)
        finally:
            loop.call_soon_threadsafe(loop.stop)

    def abandon(self) -> None:
        """In a forked child, detach from the parent's store. The store's thread does not exist in the child.
        The child keeps references to the objects it was using, because garbage collection would tear them
        down."""
        if self._engine is not None:
            self._engine.abandon()
        _of_parents.append((self._loop, self._store, self._settlements))
        self._opening = threading.Lock()
        self._under_way = None
        self._loop = self._engine = self._store = self._settlements = None

    def adjust(self, *, policies: PolicySet, deadline_seconds: float, min_confidence: float) -> None:
        """Keep the open store and change its policies and limits."""
        self.policies, self.min_confidence, self._deadline = policies, min_confidence, deadline_seconds
        if self._store is not None:
            self._store.deadline_seconds = deadline_seconds

    # Use -------------------------------------------------------------------------------------------

    def now(self) -> int:
        """The store's time, in microseconds since 1970 (UTC)."""
        return wall_clock() if self._store is None else self._store.now()

    def submit_sync(self, command: Command) -> Reply:
        """Apply a command and return its reply once it is committed.

        A caller that gives up does not withdraw its command. If that command admits an execution, the
        admission is given back.
        """
        self.open()
        told = self._hand_over(command)
        try:
            return self._wait(told, self._patience)
        except BaseException:
            self._let_go(told)
            raise

    async def submit(self, command: Command) -> Reply:
        """As `submit_sync`."""
        await self._opened()
        told = self._hand_over(command)
        try:
            return await self._await(told)
        except BaseException:
            self._let_go(told)
            raise

    def read_sync(self, query: Callable[[Engine], Awaitable[T]]) -> T:
        """Run a query on the store and return its result."""
        self.open()
        return self._wait(self._begin(self._read(query)), self._patience)

    async def read(self, query: Callable[[Engine], Awaitable[T]]) -> T:
        """As `read_sync`."""
        await self._opened()
        return await self._await(self._begin(self._read(query)))

    def settle_sync(
        self, admitted: Admitted, outcome: Ending, *, cost: int | None = None, cause: str | None = None
    ) -> Settled | None:
        """Settle an execution. None: the store cannot commit now, and the settlement is kept for later."""
        return self._wait(self.begin_settling(admitted, outcome, cost=cost, cause=cause), self._patience)

    async def settle(
        self, admitted: Admitted, outcome: Ending, *, cost: int | None = None, cause: str | None = None
    ) -> Settled | None:
        """As `settle_sync`. Cancelling the caller does not cancel the settlement."""
        return await self._await(self.begin_settling(admitted, outcome, cost=cost, cause=cause))

    def begin_settling(
        self, admitted: Admitted, outcome: Ending, *, cost: int | None = None, cause: str | None = None
    ) -> Future[Settled | None]:
        """Start a settlement without waiting for it."""
        return self._begin(self._settle(admitted, outcome, cost, cause))

    # On the store's thread -------------------------------------------------------------------------

    async def _submit(self, command: Command) -> Reply:
        if self._store is None or self._settlements is None:
            raise StoreClosed("the store is closed")
        return await self._store.submit(command, late=self._settlements.give_back)

    async def _read(self, query: Callable[[Engine], Awaitable[T]]) -> T:
        if self._store is None:
            raise StoreClosed("the store is closed")
        try:
            async with asyncio.timeout(self._deadline):
                return await query(self._store.engine)
        except TimeoutError as exc:
            raise StoreUnavailable(f"the store did not answer within {self._deadline:g} s") from exc

    async def _settle(
        self, admitted: Admitted, outcome: Ending, cost: int | None, cause: str | None
    ) -> Settled | None:
        if self._settlements is None:
            raise StoreClosed("the store is closed")
        return await self._settlements.settle(admitted, {}, outcome, cost, cause=cause)

    # Between the threads ---------------------------------------------------------------------------

    @property
    def _patience(self) -> float:
        return self._deadline + GRACE_SECONDS

    async def _opened(self) -> None:
        if self._store is None:
            await asyncio.to_thread(self.open)

    def _begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        loop = self._loop
        try:
            if loop is None:
                raise RuntimeError("there is no loop any more")
            if threading.current_thread() is self._thread:
                raise RuntimeError("the store's own thread cannot wait for itself")
            return asyncio.run_coroutine_threadsafe(work, loop)
        except RuntimeError as exc:
            work.close()
            raise StoreClosed(f"the store is closed: {exc}") from exc

    def _hand_over(self, command: Command) -> Future[Reply]:
        """Submit a command. The caller takes its reply from the future; if the future is cancelled first, an
        admission is given back. Exactly one of the two happens, also when the caller is cancelled."""
        told: Future[Reply] = Future()

        async def carry_out() -> None:
            try:
                reply = await self._submit(command)
            except BaseException as exc:
                cause = (
                    StoreClosed("the store was closed") if isinstance(exc, asyncio.CancelledError) else exc
                )
                if told.set_running_or_notify_cancel():
                    told.set_exception(cause)
            else:
                if told.set_running_or_notify_cancel():
                    told.set_result(reply)
                else:
                    self._give_back(reply)

        self._begin(carry_out())
        return told

    def _let_go(self, told: Future[Reply]) -> None:
        """Abandon a reply. Its admission, now or later, is given back."""
        if told.cancel() or told.exception() is not None:
            return
        with suppress(StoreUnavailable):
            self._begin(self._later(told.result()))

    async def _later(self, reply: Reply) -> None:
        self._give_back(reply)

    def _give_back(self, reply: Reply) -> None:
        if self._settlements is not None:
            self._settlements.give_back(reply)

    def _wait(self, future: Future[T], seconds: float) -> T:
        try:
            return future.result(seconds)
        except TimeoutError as exc:
            raise StoreUnavailable(f"the store did not answer within {seconds:g} s") from exc

    async def _await(self, future: Future[T]) -> T:
        try:
            async with asyncio.timeout(self._patience):
                return await asyncio.shield(asyncio.wrap_future(future))
        except TimeoutError as exc:
            raise StoreUnavailable(f"the store did not answer within {self._patience:g} s") from exc


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


__all__ = ["Library", "configure", "library", "opened"]

MEMORY = "memory://"
DEADLINE_SECONDS = 2.0
MIN_CONFIDENCE = 0.50

# Without policy files the scope alone decides, as in the system that the library replaces.
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
    """Choose the store of this program, and open it. The store chosen before is closed.

    If `store_url` names the same file again, its store stays open and takes the new values. Change to another
    store only while no action runs, because a running action cannot settle in a closed store.

    `store_url` is `memory://` (lost at exit), or `sqlite:///file.db` (relative to the working folder) or
    `sqlite:////absolute/file.db`. One process at a time owns a file. `policies` is a folder of policy files;
    without it, scopes alone decide. `deadline_seconds` is how long a call may wait for the store.

    Raises ValueError for a wrong value, ConfigurationError for policies that cannot be used, and
    StoreUnavailable, naming the cause, if the store cannot be opened; later calls then try again.
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
            # The store stays open, because running executions must still be settled in it.
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
    """The configured store; a store in memory if none was configured."""
    global _configured
    with _choosing:
        if _configured is None:
            _configured = opened(MEMORY)
        return _configured


def opened(store_url: str) -> Library:
    """The store of this URL, shared by all callers in this process. Raises ValueError."""
    store = _store_settings(store_url, DEADLINE_SECONDS)
    with _choosing:
        return _libraries.setdefault(
            store.url, Library(store, policies=UNRESTRICTED, min_confidence=MIN_CONFIDENCE)
        )


def _store_settings(store_url: str, deadline_seconds: float) -> StoreSettings:
    given = {"url": store_url, "deadline_seconds": deadline_seconds}
    settings, mistakes = validated(StoreSettings, given, {"folder": Path.cwd()})
    if settings is None:
        name = {"url": "store_url"}.get(str(mistakes[0].path[0]), mistakes[0].path[0])
        raise ValueError(f"{name} {mistakes[0].message}")
    return settings


def _confidence(value: float) -> float:
    care, mistakes = validated(Care, {"min_confidence": value})
    if care is None:
        raise ValueError(f"min_confidence {mistakes[0].message}")
    return care.min_confidence


def _close_all() -> None:
    """Close all stores at exit. The daemon threads of the stores still run then."""
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

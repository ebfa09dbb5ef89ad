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
from typing import Any, Literal, NamedTuple, TypeVar

from sidecar.clock import wall_clock
from sidecar.core.command import Admitted, Command, Reply, Settled
from sidecar.core.policy import ActionPolicy, PolicySet, RiskClass
from sidecar.errors import StoreClosed, StoreUnavailable
from sidecar.gate.observer import Observer
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

__all__ = ["ThreadedStore", "configure", "configured_store", "opened"]

T = TypeVar("T")
Query = Callable[[Engine], Awaitable[T]]

MEMORY = "memory://"
DEADLINE_SECONDS = 2.0
MIN_CONFIDENCE = 0.50
# How long the thread may take beyond the store's own deadline before it counts as hanging.
GRACE_SECONDS = 1.0
# The time limit of closing, and of opening, which may have to migrate a large database.
OPEN_SECONDS = 30.0

Ending = Literal["answered", "not_sent", "unknown"]

# References to the parent's objects in a forked child, which keep them from being destroyed there.
_of_parents: list[object] = []


class _Running(NamedTuple):
    """What lives on the thread of an open store."""

    engine: SqliteEngine
    store: Store
    settlements: Settlements


class ThreadedStore:
    """One store, opened on first use. A call that fails raises StoreUnavailable, naming the cause."""

    def __init__(self, store: StoreSettings, *, policies: PolicySet, min_confidence: float) -> None:
        self.url = store.url
        self.policies = policies
        self.min_confidence = min_confidence
        self._file = store.file
        self._deadline = store.deadline_seconds
        self._opening = threading.Lock()
        self._under_way: Future[None] | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: _Running | None = None
        self._closed = False

    # Opening and closing ---------------------------------------------------------------------------

    def open(self, seconds: float | None = None) -> None:
        """Open the store if it is not open yet. Raises the failure; the next use tries again.

        The caller waits at most `seconds` (None: as long as any call). After that the opening goes on.
        """
        if self._running is not None:
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
            self.wait(under_way, seconds)
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
        self._running = _Running(engine, store, Settlements(store, Observer(metrics), "library"))

    def close(self) -> None:
        """Commit the waiting commands, close the store and end its thread. Later calls raise StoreClosed."""
        with self._opening:
            self._closed = True
            loop, under_way = self._loop, self._under_way
        if loop is None:
            return
        if under_way is not None:
            with suppress(Exception):
                self.wait(under_way, OPEN_SECONDS)
        running, self._running, self._loop = self._running, None, None

        async def drain() -> None:
            if running is not None:
                await running.settlements.close()
                await running.store.close()
            # Callers that still wait get a reply, or an exception, before the loop ends.
            waiting = asyncio.all_tasks() - {asyncio.current_task()}
            for late in (await asyncio.wait(waiting, timeout=GRACE_SECONDS))[1] if waiting else ():
                late.cancel()

        try:
            self.wait(asyncio.run_coroutine_threadsafe(drain(), loop), OPEN_SECONDS)
        finally:
            loop.call_soon_threadsafe(loop.stop)

    def abandon(self) -> None:
        """In a forked child, detach from the parent's store. The store's thread does not exist in the child.
        The child keeps references to the objects it was using, because garbage collection would tear them
        down."""
        if self._running is not None:
            self._running.engine.abandon()
        _of_parents.append((self._loop, self._running))
        self._opening = threading.Lock()
        self._under_way = self._running = self._loop = None

    def adjust(self, *, policies: PolicySet, deadline_seconds: float, min_confidence: float) -> None:
        """Keep the open store and change its policies and limits."""
        self.policies, self.min_confidence, self._deadline = policies, min_confidence, deadline_seconds
        if self._running is not None:
            self._running.store.deadline_seconds = deadline_seconds

    # Use -------------------------------------------------------------------------------------------

    def now(self) -> int:
        """The store's time, in microseconds since 1970 (UTC)."""
        return wall_clock() if self._running is None else self._running.store.now()

    def submit_sync(self, command: Command) -> Reply:
        """Apply a command and return its reply once it is committed.

        A caller that gives up does not withdraw its command. If that command admits an execution, the
        admission is given back.
        """
        self.open()
        reply = self._hand_over(command)
        try:
            return self.wait(reply)
        except BaseException:
            self._let_go(reply)
            raise

    async def submit(self, command: Command) -> Reply:
        """As `submit_sync`."""
        await self._opened()
        reply = self._hand_over(command)
        try:
            return await self.wait_async(reply)
        except BaseException:
            self._let_go(reply)
            raise

    def read_sync(self, query: Query[T]) -> T:
        """Run a query on the store and return its result."""
        self.open()
        return self.wait(self._begin(self._read(query)))

    async def read(self, query: Query[T]) -> T:
        """As `read_sync`."""
        await self._opened()
        return await self.wait_async(self._begin(self._read(query)))

    def begin_settling(
        self, admitted: Admitted, outcome: Ending, *, cost: int | None = None, cause: str | None = None
    ) -> Future[Settled | None]:
        """Start to settle an execution. None: the store cannot commit now, and keeps it for later."""
        return self._begin(self._settle(admitted, outcome, cost, cause))

    def wait(self, future: Future[T], seconds: float | None = None) -> T:
        """Wait for the store, at most `seconds` (None: as long as any call)."""
        seconds = self._patience if seconds is None else seconds
        try:
            return future.result(seconds)
        except TimeoutError as exc:
            raise _late(seconds) from exc

    async def wait_async(self, future: Future[T]) -> T:
        """As `wait`. Cancelling the caller does not cancel the store's work."""
        try:
            async with asyncio.timeout(self._patience):
                return await asyncio.shield(asyncio.wrap_future(future))
        except TimeoutError as exc:
            raise _late(self._patience) from exc

    # On the store's thread -------------------------------------------------------------------------

    def _open_now(self) -> _Running:
        if self._running is None:
            raise StoreClosed("the store is closed")
        return self._running

    async def _submit(self, command: Command) -> Reply:
        running = self._open_now()
        return await running.store.submit(command, late=running.settlements.give_back)

    async def _read(self, query: Query[T]) -> T:
        store = self._open_now().store
        try:
            async with asyncio.timeout(self._deadline):
                return await query(store.engine)
        except TimeoutError as exc:
            raise _late(self._deadline) from exc

    async def _settle(
        self, admitted: Admitted, outcome: Ending, cost: int | None, cause: str | None
    ) -> Settled | None:
        return await self._open_now().settlements.settle(admitted, outcome, cost=cost, cause=cause)

    # Between the threads ---------------------------------------------------------------------------

    @property
    def _patience(self) -> float:
        return self._deadline + GRACE_SECONDS

    async def _opened(self) -> None:
        if self._running is None:
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
        taken: Future[Reply] = Future()

        async def carry_out() -> None:
            try:
                reply = await self._submit(command)
            except BaseException as exc:
                closed = isinstance(exc, asyncio.CancelledError)
                if taken.set_running_or_notify_cancel():
                    taken.set_exception(StoreClosed("the store was closed") if closed else exc)
            else:
                if taken.set_running_or_notify_cancel():
                    taken.set_result(reply)
                else:
                    await self._give_back(reply)

        self._begin(carry_out())
        return taken

    def _let_go(self, reply: Future[Reply]) -> None:
        """Abandon a reply. Its admission, now or later, is given back."""
        if reply.cancel() or reply.exception() is not None:
            return
        with suppress(StoreUnavailable):
            self._begin(self._give_back(reply.result()))

    async def _give_back(self, reply: Reply) -> None:
        if self._running is not None:
            self._running.settlements.give_back(reply)


def _late(seconds: float) -> StoreUnavailable:
    return StoreUnavailable(f"the store did not answer within {seconds:g} s")


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


# The stores of this process -------------------------------------------------------------------------

# Without policy files the scope alone decides, as in the system that the library replaces.
UNRESTRICTED = PolicySet(revision="none", actions={}, unlisted=ActionPolicy(risk=RiskClass.LOW))

_choosing = threading.RLock()
_stores: dict[str, ThreadedStore] = {}
_configured: ThreadedStore | None = None


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
    chosen = ThreadedStore(
        _store_settings(store_url, deadline_seconds),
        policies=UNRESTRICTED if policies is None else policyfiles.load(Path(policies)),
        min_confidence=_confidence(min_confidence),
    )
    with _choosing:
        current = _stores.get(chosen.url)
        if current is not None and chosen.url != MEMORY:
            # The store stays open, because running executions must still be settled in it.
            current.adjust(
                policies=chosen.policies, deadline_seconds=deadline_seconds, min_confidence=min_confidence
            )
            chosen = current
        before, _configured = _configured, chosen
        _stores[chosen.url] = chosen
        given_up = [each for each in {before, current} if each is not None and each is not chosen]
        for each in given_up:
            if _stores.get(each.url) is each:
                del _stores[each.url]
    for each in given_up:
        each.close()
    chosen.open(OPEN_SECONDS)


def configured_store() -> ThreadedStore:
    """The configured store; a store in memory if none was configured."""
    global _configured
    with _choosing:
        if _configured is None:
            _configured = opened(MEMORY)
        return _configured


def opened(store_url: str) -> ThreadedStore:
    """The store of this URL, shared by all callers in this process. Raises ValueError."""
    store = _store_settings(store_url, DEADLINE_SECONDS)
    with _choosing:
        return _stores.setdefault(
            store.url, ThreadedStore(store, policies=UNRESTRICTED, min_confidence=MIN_CONFIDENCE)
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
    for each in list(_stores.values()):
        with suppress(StoreUnavailable):
            each.close()


def _after_fork() -> None:
    global _choosing
    _choosing = threading.RLock()
    for each in _stores.values():
        each.abandon()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_after_fork)

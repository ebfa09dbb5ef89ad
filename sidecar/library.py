"""The store of a program that embeds Scopegate: no sidecar process, the same store, log and core.

It runs on a daemon thread with a loop of its own, so that it works from any thread and from inside or outside
anybody's running loop. Whoever waits for it waits with a deadline.
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

from pydantic import ValidationError

from sidecar import policyfiles
from sidecar.clock import wall_clock
from sidecar.configvalues import sentence
from sidecar.core.command import Admit, Admitted, Command, Reply, Settled
from sidecar.core.policy import ActionPolicy, PolicySet, RiskClass
from sidecar.crash import account_for_crash
from sidecar.errors import StoreClosed, StoreUnavailable
from sidecar.settings import Care
from sidecar.settings import Store as StoreSettings
from sidecar.settlements import Settlements
from sidecar.store.base import Engine
from sidecar.store.batch import Store
from sidecar.store.sqlite import SqliteEngine
from sidecar.telemetry import Metrics

T = TypeVar("T")

MEMORY = "memory://"
DEADLINE_SECONDS = 2.0
MIN_CONFIDENCE = 0.50
# What the thread gets beyond the store's own deadline before it counts as hanging.
GRACE_SECONDS = 1.0
# What `configure` gets, since a large database may have to be brought up to date first.
OPEN_SECONDS = 30.0

# Without policy files the scope alone decides, as in the system that the library stands in for.
UNRESTRICTED = PolicySet(revision="none", actions={}, unlisted=ActionPolicy(risk=RiskClass.LOW))

Ending = Literal["answered", "not_sent", "unknown"]


class Library:
    """One store, opened on first use. Every call raises StoreUnavailable, naming the cause, or succeeds."""

    def __init__(
        self,
        store: StoreSettings,
        *,
        policies: PolicySet = UNRESTRICTED,
        min_confidence: float = MIN_CONFIDENCE,
    ) -> None:
        self.url = store.url
        self.policies = policies
        self.min_confidence = min_confidence
        self._file = store.file
        self._deadline = store.deadline_seconds
        self._opening = threading.Lock()
        self._under_way: Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine: SqliteEngine | None = None
        self._store: Store | None = None
        self._settlements: Settlements | None = None
        self._closed = False

    # Opening and closing ---------------------------------------------------------------------------

    def open(self, seconds: float | None = None) -> None:
        """Open the store, if it is not open yet. A failure is raised, and tried again at the next use.

        Whoever has waited for so many seconds (None: as long as any call) waits no more; opening goes on.
        """
        if self._store is not None:
            return
        with self._opening:
            if self._closed:
                raise StoreClosed("this store was closed, because another one was configured in its place")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(
                    target=_run, args=(self._loop,), name="scopegate-library", daemon=True
                ).start()
            if self._under_way is None:
                self._under_way = self._begin(self._open())
            under_way = self._under_way
        try:
            self._wait(
                under_way, self._deadline + GRACE_SECONDS if seconds is None else seconds, withdraw=False
            )
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
            await account_for_crash(store)
        except BaseException:
            await store.close()
            raise
        self._engine, self._settlements, self._store = engine, Settlements(store, metrics), store

    def close(self) -> None:
        """Commit what waits, close the store and end its thread. What comes after raises StoreClosed."""
        with self._opening:
            self._closed = True
            loop, under_way = self._loop, self._under_way
        if loop is None:
            return
        if under_way is not None:
            with suppress(Exception):
                self._wait(under_way, OPEN_SECONDS, withdraw=False)
        store, settlements = self._store, self._settlements
        self._loop = self._engine = self._store = self._settlements = None

        async def last_words() -> None:
            if store is not None and settlements is not None:
                await settlements.close()
                await store.close()
            # Whoever still waits for a reply is told before the loop ends.
            waiting = asyncio.all_tasks() - {asyncio.current_task()}
            for late in (await asyncio.wait(waiting, timeout=GRACE_SECONDS))[1] if waiting else ():
                late.cancel()

        try:
            self._wait(asyncio.run_coroutine_threadsafe(last_words(), loop), OPEN_SECONDS)
        finally:
            loop.call_soon_threadsafe(loop.stop)

    def abandon(self) -> None:
        """In a forked child: leave the parent's store alone. Its thread is not here, but what it was in the
        middle of is kept, or the child would tear it down."""
        if self._engine is not None:
            self._engine.abandon()
        _of_parents.append((self._loop, self._store, self._settlements))
        self._opening = threading.Lock()
        self._under_way = None
        self._loop = self._engine = self._store = self._settlements = None

    # Use -------------------------------------------------------------------------------------------

    def now(self) -> int:
        """The store's time, in microseconds since 1970 (UTC)."""
        return wall_clock() if self._store is None else self._store.now()

    def submit_sync(self, command: Command) -> Reply:
        """Apply a command and return its reply once it is committed."""
        self.open()
        return self._wait(self._begin(self._submit(command)), self._deadline + GRACE_SECONDS)

    async def submit(self, command: Command) -> Reply:
        """As `submit_sync`. A cancelled caller withdraws nothing but an admission, which is given back."""
        await self._opened()
        future = asyncio.wrap_future(self._begin(self._submit(command)))
        return await (future if isinstance(command, Admit) else asyncio.shield(future))

    def read_sync(self, query: Callable[[Engine], Awaitable[T]]) -> T:
        """What a query finds in the store."""
        self.open()
        return self._wait(self._begin(self._read(query)), self._deadline + GRACE_SECONDS)

    async def read(self, query: Callable[[Engine], Awaitable[T]]) -> T:
        """As `read_sync`."""
        await self._opened()
        return await asyncio.wrap_future(self._begin(self._read(query)))

    def settle_sync(
        self, admitted: Admitted, outcome: Ending, *, cost: int | None = None, cause: str | None = None
    ) -> Settled | None:
        """Write down how an execution ended; None where that has to wait for the store (it is kept)."""
        self.open()
        future = self._begin(self._settle(admitted, outcome, cost, cause))
        return self._wait(future, self._deadline + GRACE_SECONDS, withdraw=False)

    async def settle(
        self, admitted: Admitted, outcome: Ending, *, cost: int | None = None, cause: str | None = None
    ) -> Settled | None:
        """As `settle_sync`. A cancelled caller does not keep it from being written."""
        await self._opened()
        return await asyncio.shield(
            asyncio.wrap_future(self._begin(self._settle(admitted, outcome, cost, cause)))
        )

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

    async def _opened(self) -> None:
        if self._store is None:
            await asyncio.to_thread(self.open)

    def _begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        loop = self._loop
        if loop is None:
            work.close()
            raise StoreClosed("the store is closed")
        return asyncio.run_coroutine_threadsafe(work, loop)

    def _wait(self, future: Future[T], seconds: float, *, withdraw: bool = True) -> T:
        try:
            return future.result(seconds)
        except TimeoutError as exc:
            if withdraw:
                future.cancel()
            raise StoreUnavailable(f"the store did not answer within {seconds:g} s") from exc
        except BaseException:
            if withdraw:
                future.cancel()  # interrupted while waiting
            raise


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


# The stores of this process ----------------------------------------------------------------------------

_choosing = threading.RLock()
_libraries: dict[str, Library] = {}
_configured: Library | None = None
_of_parents: list[object] = []


def configure(
    store_url: str = MEMORY,
    *,
    policies: str | os.PathLike[str] | None = None,
    deadline_seconds: float = DEADLINE_SECONDS,
    min_confidence: float = MIN_CONFIDENCE,
) -> None:
    """Name the store of this program, and open it; the one before is closed.

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
        for before in {_configured, _libraries.pop(chosen.url, None)} - {None}:
            assert before is not None
            _libraries.pop(before.url, None)
            before.close()
        _configured = _libraries[chosen.url] = chosen
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
        return _libraries.setdefault(store.url, Library(store))


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

"""Group commit: commands that arrive during a commit are applied in the next transaction. One writer decides.

There is no timer window. One fsync pays for all requests that came in during the one before, and since
the writer is serial there is no race to reason about: the commands of a batch are applied in order, each
to the rows as the one before left them.

The last commit says whether the store works. `last_error` remembers a commit that fails, or that does not
come before a command's deadline, and only a commit that succeeds clears it. A small write proves little: on
a full disk it still fits, and it meets no table that a decision needs. So without traffic the writer
rehearses: it makes a whole decision and undoes it, writes as much as a large one takes, and commits.

A commit that reports a failure may have been carried out all the same. Its batch is refused, because nothing
proves that it is durable; but as soon as the head of the log shows it, its replies are delivered late, so
that what it admitted is given back.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sidecar.clock import SETTLE_SECONDS, Clock, Moment, Timekeeper
from sidecar.core.apply import Judgment, apply, judgment
from sidecar.core.chain import GENESIS
from sidecar.core.command import (
    AcceptClock,
    Admit,
    Bind,
    Command,
    Denied,
    Emit,
    Issue,
    PassUnlisted,
    Refuse,
    Reply,
    Settle,
)
from sidecar.core.state import State, names
from sidecar.errors import (
    ClockUnsettled,
    CommandFailed,
    Refusal,
    StoreClosed,
    StoreOverloaded,
    StoreUnavailable,
)
from sidecar.store._changes import Masking, apply_all
from sidecar.store._rehearsal import rehearsed
from sidecar.store.base import ChainHead, Changes, Engine, StoreObserver
from sidecar.telemetry.events import LogEvent

# The size of a batch is bounded, because the commands behind it wait for the whole transaction.
MAX_BATCH = 512
# Commands that may wait. Beyond this limit commands are rejected, so that queued ones meet their deadline.
MAX_QUEUE = 4096

# The interval at which a failing store retries, and at which the clocks are read even without traffic.
LOOK_SECONDS = 0.5
# How long `check` waits for the next rehearsal while the store fails.
PATIENCE_SECONDS = 0.5

# How long closing may take beyond the deadline of the commands that still wait.
CLOSE_SECONDS = 1.0

# The commands that are rejected while too many wait. The others end or reverse what was begun.
BOUNDED = Admit | Issue | Refuse | PassUnlisted | Emit | Bind

LateReply = Callable[[Reply], None]


@dataclass(slots=True, eq=False)
class _Waiting:
    command: Command
    reply: asyncio.Future[Reply]
    late: LateReply | None
    deadline: float


class Store:
    """The only access to the stored state. Reads go to `engine`; changes go through `submit`."""

    def __init__(
        self,
        engine: Engine,
        *,
        clock: Clock,
        deadline_seconds: float,
        elapsed: Clock | None = None,
        settle_seconds: float = SETTLE_SECONDS,
        observer: StoreObserver | None = None,
        mask: Masking | None = None,
    ) -> None:
        self.engine = engine
        self._time = Timekeeper(clock, elapsed, settle_seconds=settle_seconds)
        self.deadline_seconds = deadline_seconds
        self._observer = observer
        self._mask = mask
        self._queue: deque[_Waiting] = deque()
        self._outstanding: deque[_Waiting] = deque()
        self._sweep: asyncio.TimerHandle | None = None
        self._wakeup: asyncio.Future[None] | None = None
        self._writer: asyncio.Task[None] | None = None
        self._head: ChainHead | None = None
        self.durable = ChainHead("", 0, GENESIS, 0)
        self._committing = False
        self._closing = False
        # A batch that failed but may be committed: the head it would leave, and its late replies.
        self._doubted: tuple[ChainHead, list[tuple[LateReply, Reply]]] | None = None
        self._rehearsal: asyncio.Future[None] | None = None
        self._keeper: asyncio.Task[None] | None = None
        # Why the last durable commit failed, and decisions with it. None: no failure is known.
        self.last_error: str | None = None

    async def open(self) -> None:
        """Open the engine and start the writer. Raises StoreUnavailable, naming the cause."""
        self._head = await self.engine.open()
        self._time.begin(self._head.time)
        await self.engine.probe()
        self.durable = self._head
        self._writer = asyncio.create_task(self._write(), name="scopegate-store-writer")
        self._keeper = asyncio.create_task(self._keep(), name="scopegate-store-keeper")

    async def close(self) -> bool:
        """Commit the waiting commands, then close the engine. Later commands raise StoreClosed.

        Returns False if the storage hangs. Then its thread keeps running until the process ends.
        """
        closing = asyncio.ensure_future(self._close())
        done, _ = await asyncio.wait([closing], timeout=self.deadline_seconds + CLOSE_SECONDS)
        if done:
            closing.result()
        else:
            LogEvent.STORE_HANGS.log()
        return bool(done)

    async def _close(self) -> None:
        self._closing = True
        if self._keeper is not None:
            self._keeper.cancel()
        if self._writer is not None:
            self._wake()
            await self._writer
        if self._sweep is not None:
            self._sweep.cancel()
        await self.engine.close()

    async def until_idle(self) -> None:
        """Wait until every submitted command is committed or given up, at most until their deadline."""
        last = asyncio.get_running_loop().time() + self.deadline_seconds
        while (self._queue or self._committing) and asyncio.get_running_loop().time() < last:
            await asyncio.sleep(0.005)

    @property
    def waiting(self) -> int:
        """Commands in the queue."""
        return len(self._queue)

    def now(self) -> int:
        """The decision time, in microseconds since 1970 (UTC); see `sidecar.clock`."""
        return self._time.read().now

    def clock_lag_seconds(self) -> float:
        """How far the wall clock is behind the decision time; 0 if it is not behind."""
        return self._time.read().lag_seconds

    def clock_trouble(self) -> str | None:
        """Why the clock cannot be used for decisions now; None if it can."""
        return self._time.read().trouble

    async def _keep(self) -> None:
        """Read the clocks now and then, and try again while decisions fail, with or without requests."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self._time.read()
            if self.last_error is not None:
                self._rehearse_soon()

    def _rehearse_soon(self) -> asyncio.Future[None]:
        """Ask the writer to rehearse a decision when it is idle. One rehearsal serves all callers."""
        if self._rehearsal is None:
            self._rehearsal = asyncio.get_running_loop().create_future()
            self._wake()
        return self._rehearsal

    async def check(self) -> None:
        """Prove that the store can write, and make all commits durable.

        While decisions fail, only a rehearsal proves that. Raises StoreUnavailable, naming the cause.
        """
        if self._closing or self._writer is None:
            raise StoreClosed("the store is closed")
        if self.last_error is not None:
            await asyncio.wait([self._rehearse_soon()], timeout=min(PATIENCE_SECONDS, self.deadline_seconds))
            if self.last_error is not None:
                raise StoreUnavailable(self.last_error)
        committed = self._head
        try:
            async with asyncio.timeout(self.deadline_seconds):
                await self.engine.probe()
                await self.engine.tidy()
        except TimeoutError as exc:
            self.last_error = f"the store did not answer within {self.deadline_seconds:g} s"
            raise StoreUnavailable(self.last_error) from exc
        except StoreUnavailable as exc:
            self.last_error = str(exc)
            raise
        if committed is not None and committed.seq > self.durable.seq:
            self.durable = committed

    async def submit(self, command: Command, *, late: LateReply | None = None) -> Reply:
        """Apply a command and return its reply once it is committed.

        Raises StoreUnavailable if it could not be committed before the deadline. A caller gives up at the
        deadline or by cancellation. If the batch is not being written yet, the command is withdrawn.
        Otherwise it may still be committed, and then `late` is called with its reply.
        """
        if self._closing or self._writer is None:
            raise StoreClosed("the store is closed")
        while self._queue and self._queue[0].reply.done():
            self._queue.popleft()  # its caller gave up, so it must not take a place in the queue
        if len(self._queue) >= MAX_QUEUE and isinstance(command, BOUNDED):
            raise StoreOverloaded(f"{MAX_QUEUE} commands are waiting for the store")
        loop = asyncio.get_running_loop()
        waiting = _Waiting(command, loop.create_future(), late, loop.time() + self.deadline_seconds)
        self._queue.append(waiting)
        while self._outstanding and self._outstanding[0].reply.done():
            self._outstanding.popleft()
        self._outstanding.append(waiting)
        if self._sweep is None:
            self._sweep = loop.call_at(waiting.deadline, self._expire)
        self._wake()
        try:
            return await waiting.reply
        except asyncio.CancelledError:
            # The caller was cancelled after the commit, before it received the reply.
            if late is not None and _has_result(waiting.reply):
                late(waiting.reply.result())
            raise

    def _expire(self) -> None:
        """Fail the commands past their deadline. All deadlines are equally long, so the oldest is first."""
        loop = asyncio.get_running_loop()
        outstanding = self._outstanding
        while outstanding and (outstanding[0].reply.done() or outstanding[0].deadline <= loop.time()):
            waiting = outstanding.popleft()
            if not waiting.reply.done():
                late = f"the store did not commit within {self.deadline_seconds:g} s"
                last = f" (last error: {self.last_error})" if self.last_error else ""
                waiting.reply.set_exception(StoreUnavailable(late + last))
                self.last_error = self.last_error or late
        self._sweep = loop.call_at(outstanding[0].deadline, self._expire) if outstanding else None

    def _wake(self) -> None:
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)

    def _take(self) -> list[_Waiting]:
        """The next batch. A command whose caller gave up is dropped before it begins."""
        batch: list[_Waiting] = []
        while self._queue and len(batch) < MAX_BATCH:
            alone = isinstance(self._queue[0].command, AcceptClock)
            if alone and batch:
                break  # AcceptClock is applied at its own time, so it is the only command of its batch
            waiting = self._queue.popleft()
            if not waiting.reply.done():
                batch.append(waiting)
                if alone:
                    break
        return batch

    async def _write(self) -> None:
        while True:
            batch = self._take()
            if batch:
                self._committing = True
                await self._commit(batch)
                self._committing = False
                await self._tidy()
            elif self._closing:
                return
            elif self._rehearsal is not None:
                await self._rehearse(self._rehearsal)
                self._rehearsal = None
            elif not self._queue:
                self._wakeup = asyncio.get_running_loop().create_future()
                await self._wakeup

    async def _commit(self, batch: Sequence[_Waiting]) -> None:
        """Commit a batch and reply to every command. Never raises, because that would end the writer."""
        begun = time.perf_counter()
        moment = self._time.read()
        if moment.trouble is not None:
            batch = _let_wait_for_the_clock(batch, moment.trouble)
        if not batch:
            return
        commands = [waiting.command for waiting in batch]
        durable = _is_durable(commands)
        try:
            replies = await self._transact(batch, moment, durable=durable)
        except StoreUnavailable as exc:
            self.last_error = str(exc)
            LogEvent.COMMIT_FAILED.log(cause=str(exc), batch_size=len(batch))
            await self._failed(batch, exc)
        except Exception as exc:
            # One of the commands failed, not the storage. Apply each by itself, so that the others succeed.
            if len(batch) == 1:
                LogEvent.COMMAND_FAILED.log(exc=exc)
                failed = CommandFailed(f"the command could not be applied: {exc!r}")
                self.last_error = str(failed)
                await self._failed(batch, failed)
                return
            if await self._read_head():
                await self._failed(batch, StoreUnavailable(f"the commit failed: {exc!r}"))
                return
            for waiting in batch:
                await self._commit([waiting])
        else:
            if durable:
                self.last_error = None
            if self._observer is not None:
                self._observer.batch_committed(len(batch), time.perf_counter() - begun)
            for waiting, reply in zip(batch, replies, strict=True):
                if not waiting.reply.done():
                    waiting.reply.set_result(reply)
                elif waiting.late is not None:
                    waiting.late(reply)

    async def _failed(self, batch: Sequence[_Waiting], exc: StoreUnavailable) -> None:
        if self._observer is not None:
            self._observer.batch_failed(len(batch))
        for waiting in batch:
            if not waiting.reply.done():
                waiting.reply.set_exception(exc)
        await self._read_head()

    async def _read_head(self) -> bool:
        """Read the head after a failed commit; True if the head shows that the commit took effect.

        Only the database knows where the chain ends now.
        """
        try:
            self._head = await self.engine.head()
            self._time.found(self._head.time)
        except StoreUnavailable:
            self._head = None
        except Exception as exc:
            # The database was altered. Nothing is decided until its head can be read.
            LogEvent.HEAD_UNREADABLE.log(exc=exc)
            self._head = None
        return self._resolve()

    def _resolve(self) -> bool:
        """Deliver the late replies of a batch in doubt if the head shows that it is committed."""
        if self._head is None or self._doubted is None:
            return False
        (expected, late), self._doubted = self._doubted, None
        committed = (self._head.seq, self._head.hash) == (expected.seq, expected.hash)
        if committed:
            for tell, reply in late:
                tell(reply)
        return committed

    async def _tidy(self) -> None:
        try:
            await self.engine.tidy()
        except Exception as exc:
            # The writer must outlive every fault, or nothing would be decided any more.
            LogEvent.HOUSEKEEPING_FAILED.log(cause=str(exc) or repr(exc))

    async def _rehearse(self, rehearsal: asyncio.Future[None]) -> None:
        """Test whether a decision can be written now. Never raises, because that would end the writer."""
        commands = rehearsed()
        now = self.now()
        try:
            head = await self._known_head()
            await self.engine.rehearse(
                names(commands, now),
                lambda state: apply_all(commands, state, head, now, [], self._mask)[0],
            )
        except StoreUnavailable as exc:
            self.last_error = str(exc)
        except Exception as exc:
            self.last_error = f"a decision cannot be written: {exc!r}"
            await self._read_head()
        else:
            self.last_error = None
            await self._tidy()
        if not rehearsal.done():
            rehearsal.set_result(None)

    async def _known_head(self) -> ChainHead:
        if self._head is None:
            self._head = await self.engine.head()
            self._time.found(self._head.time)
            self._resolve()
        return self._head

    async def _transact(self, batch: Sequence[_Waiting], moment: Moment, *, durable: bool) -> list[Reply]:
        commands = [waiting.command for waiting in batch]
        head = await self._known_head()
        now = moment.now
        accepted = False
        if isinstance(commands[0], AcceptClock):
            commands, now, accepted = [replace(commands[0], before=now)], moment.wall, True
        replies: list[Reply] = []

        def decide(state: State) -> Changes:
            changes, head_after = apply_all(commands, state, head, now, replies, self._mask)
            heads.append(head_after)
            return changes

        heads: list[ChainHead] = []
        wanted = names(commands, now)
        try:
            await self.engine.transact(wanted, decide, durable=durable)
        except Exception:
            if heads and heads[-1].seq > head.seq:
                pairs = zip(batch, replies, strict=True)
                late = [(waiting.late, reply) for waiting, reply in pairs if waiting.late is not None]
                self._doubted = heads[-1], late
            raise
        self._head = heads[-1]
        if accepted:
            self._time.accept(moment)
        elif self._head.seq > head.seq:
            self._time.wrote(moment)
        if durable:
            self.durable = self._head
        return replies


def _is_durable(commands: Sequence[Command]) -> bool:
    """Whether a batch needs a full sync. One of settlements only does not: if a power failure loses a
    settlement, its hold stays, which is safe."""
    return not all(isinstance(command, Settle) for command in commands)


def _let_wait_for_the_clock(batch: Sequence[_Waiting], trouble: str) -> list[_Waiting]:
    """Refuse commands that let something through while the clock is not trusted; return the others."""
    rest: list[_Waiting] = []
    for waiting in batch:
        if not isinstance(waiting.command, Issue | Admit | PassUnlisted):
            rest.append(waiting)
        elif not waiting.reply.done():
            waiting.reply.set_exception(ClockUnsettled(trouble))
    return rest


async def predicted(engine: Engine, command: Admit, now: int) -> Judgment:
    """The judgment that an execution would get now, by the same rows and code. It changes nothing.

    Raises StoreUnavailable.
    """
    return await engine.look(names([command], now), lambda state: judgment(command, state, now))


async def freeze_on(engine: Engine, command: Refuse, now: int) -> Refusal | None:
    """The freeze that would stop a request which its shadow route lets through unread. It changes nothing.

    Raises StoreUnavailable.
    """
    reply = await engine.look(names([command], now), lambda state: apply(command, state, now).reply)
    return reply.refusal if isinstance(reply, Denied) else None


def _has_result(reply: asyncio.Future[Reply]) -> bool:
    return reply.done() and not reply.cancelled() and reply.exception() is None

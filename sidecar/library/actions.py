"""The callables that run recovery actions in the embedding program, by the name of the action.

A sync callable runs in its own thread, an async one in the caller's loop. A thread cannot be stopped. If a
sync callable takes too long or its caller is cancelled, its thread keeps running and may still act. Therefore
such an execution ends `unknown`.
"""

from __future__ import annotations

import asyncio
import builtins
import contextvars
import inspect
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Literal, TypeVar, overload

from sidecar.core.facts import IDENTIFIER_RULE, is_identifier

# Takes the parameters. Returns any value: a mapping with `cost_usd` sets the cost, an awaitable is awaited.
Action = Callable[[dict[str, Any]], Any]
AnyAction = TypeVar("AnyAction", bound=Action)

MAX_CAUSE_CHARS = 300

_registered: dict[str, Action] = {}
# The event loop holds tasks weakly, so this set keeps an abandoned task alive until it ends.
_under_way: set[asyncio.Task[Any]] = set()


class Unfinished(TimeoutError):
    """A callable did not end in time. A task was cancelled; a thread keeps running."""


class NotBegun(RuntimeError):
    """A callable could not be started, so nothing was executed."""


@overload
def register_action(name: str, callable: AnyAction) -> AnyAction: ...
@overload
def register_action(name: str) -> Callable[[AnyAction], AnyAction]: ...
def register_action(name: str, callable: Any = None) -> Any:
    """Register the callable that runs an action, and return it. It replaces an earlier one.

    Also a decorator: `@register_action("retry_agent")`. Raises ValueError for a name that is not 1 to 256
    printable characters, and TypeError for an object that cannot be called.
    """
    if not is_identifier(name):
        raise ValueError(f"the name of an action is {IDENTIFIER_RULE}")
    if callable is None:
        return lambda decorated: register_action(name, decorated)
    if not builtins.callable(callable):
        raise TypeError(f"what runs the action {name!r} must be callable")
    _registered[name] = callable
    return callable


def registered(name: str) -> Action | None:
    """The callable for an action; None if none is registered."""
    return _registered.get(name)


def begin(action: Action, parameters: dict[str, Any], seconds: float | None) -> Coroutine[Any, Any, Any]:
    """Start a callable, and return a coroutine that returns its result or raises its exception.

    Raises NotBegun if the callable could not be started. The coroutine raises Unfinished if the callable
    takes longer than `seconds`; it does not wait for a callable that ignores its cancellation.
    """
    task = asyncio.create_task(_started(action, parameters), name="scopegate-action")
    _under_way.add(task)
    task.add_done_callback(_ended)
    return _within(task, seconds)


async def _within(task: asyncio.Task[Any], seconds: float | None) -> Any:
    try:
        await asyncio.wait([task], timeout=seconds)
    except asyncio.CancelledError:
        task.cancel()
        raise
    if not task.done():
        task.cancel()
        raise Unfinished(f"the action did not end within {seconds:g} s")
    return task.result()


def ending(exc: BaseException) -> tuple[Literal["answered", "unknown"], str]:
    """The outcome and the cause for an action that raised. An exception is an answer; an interruption is
    not."""
    if isinstance(exc, Unfinished):
        return "unknown", str(exc)
    if isinstance(exc, Exception):
        return "answered", f"the action raised {_shown(exc)}"
    if isinstance(exc, asyncio.CancelledError):
        return "unknown", "the action was cancelled"
    return "unknown", f"the action was interrupted by {_shown(exc)}"


def _shown(exc: BaseException) -> str:
    try:
        text = str(exc)
    except Exception:
        text = ""
    named = f"{type(exc).__name__}: {text}" if text else type(exc).__name__
    return named[:MAX_CAUSE_CHARS].encode("utf-8", "backslashreplace").decode()


def _started(action: Action, parameters: dict[str, Any]) -> Coroutine[Any, Any, Any]:
    if inspect.iscoroutinefunction(action):
        return _in_loop(action, parameters)
    return _from_thread(_start_thread(action, parameters))


async def _in_loop(action: Action, parameters: dict[str, Any]) -> Any:
    return await action(parameters)


async def _from_thread(ended: asyncio.Future[tuple[Any, BaseException | None]]) -> Any:
    returned, raised = await ended
    if raised is not None:
        raise raised
    return await returned if inspect.isawaitable(returned) else returned


def _start_thread(
    action: Action, parameters: dict[str, Any]
) -> asyncio.Future[tuple[Any, BaseException | None]]:
    """Run a callable in a daemon thread, so that a hanging one blocks neither a pool nor the program's
    exit."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

    def deliver(outcome: tuple[Any, BaseException | None]) -> None:
        if not ended.done():
            ended.set_result(outcome)

    def work() -> None:
        outcome: tuple[Any, BaseException | None]
        try:
            outcome = action(parameters), None
        except BaseException as exc:
            outcome = None, exc
        with suppress(RuntimeError):  # the loop is closed, so no caller waits
            loop.call_soon_threadsafe(deliver, outcome)

    context = contextvars.copy_context()
    try:
        threading.Thread(target=context.run, args=(work,), name="scopegate-action", daemon=True).start()
    except RuntimeError as exc:
        raise NotBegun(f"no thread could be started for the action: {exc}") from exc
    return ended


def _ended(task: asyncio.Task[Any]) -> None:
    _under_way.discard(task)
    if not task.cancelled():
        task.exception()  # mark it as retrieved: a waiting caller has it, an abandoned task has no caller

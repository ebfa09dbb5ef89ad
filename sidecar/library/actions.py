"""The callables that run recovery actions in a program of its own, by the name of the action.

A sync callable runs in a thread of its own, an async one in the caller's loop. A thread cannot be stopped: a
sync callable that is given up, because it took too long or its caller was cancelled, is left behind and may
still act. That is why such an execution ends `unknown`.
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

from sidecar.core.facts import is_identifier

# Takes the parameters; what it returns may be a mapping with `cost_usd`, or something to await.
Action = Callable[[dict[str, Any]], Any]
AnyAction = TypeVar("AnyAction", bound=Action)

MAX_CAUSE_CHARS = 300

_registered: dict[str, Action] = {}
# The loop holds its tasks weakly; one that was given up is held here until it ends.
_under_way: set[asyncio.Task[Any]] = set()


class Unfinished(TimeoutError):
    """A callable did not end in time. It was cancelled, or, in a thread, left behind."""


class NotBegun(RuntimeError):
    """A callable could not be started, so nothing was executed."""


@overload
def register_action(name: str, callable: AnyAction) -> AnyAction: ...
@overload
def register_action(name: str) -> Callable[[AnyAction], AnyAction]: ...
def register_action(name: str, callable: Any = None) -> Any:
    """Name the callable that runs an action, in place of the one before; returns it.

    Also a decorator: `@register_action("retry_agent")`. Raises ValueError for a name that is not 1 to 256
    printable characters, TypeError for what cannot be called.
    """
    if not is_identifier(name):
        raise ValueError("the name of an action is 1 to 256 printable characters")
    if callable is None:
        return lambda decorated: register_action(name, decorated)
    if not builtins.callable(callable):
        raise TypeError(f"what runs the action {name!r} must be callable")
    _registered[name] = callable
    return callable


def registered(name: str) -> Action | None:
    """The callable for an action, None where none is registered."""
    return _registered.get(name)


def begin(action: Action, parameters: dict[str, Any], seconds: float | None) -> Coroutine[Any, Any, Any]:
    """Start a callable. To await what is returned gives what it returns; what it raises comes through.

    Raises NotBegun where it could not be started; when awaited, Unfinished where it takes longer than
    `seconds`, at once even if it does not heed its cancellation.
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
    """How an action ended that has begun and raised, and why: an exception is an answer, a cut is not."""
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
    """Run it in a daemon thread: one that hangs blocks no pool, and not the end of the program either."""
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
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
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
        task.exception()  # it was told to whoever waited; a callable that was given up has nobody to tell

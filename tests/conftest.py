"""Fixtures that every folder may use."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from sidecar.telemetry.events import LogEvent
from sidecar.web.serving.listener import raise_file_limit
from tests.support import Backend, Clock, House, Open, opened, serving_backend

# Hundreds of clients at once are on both ends in one process here.
raise_file_limit()
# What a shell starts in the background ignores Ctrl-C, and would hand that on to the programs started here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# nohup would hand on that SIGHUP is ignored. A handler is not handed on, so the run itself still survives it.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)

# Few examples in everyday runs, many by hand: `pytest tests/unit --hypothesis-profile thorough`.
settings.register_profile("everyday", max_examples=30, deadline=None)
settings.register_profile("thorough", max_examples=3_000, deadline=None)
settings.load_profile("everyday")


@pytest.fixture(autouse=True)
def every_log_line_carries_the_fields_of_its_event(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Holds the calls to the table of events, whatever the test is about."""
    log, wrong = LogEvent.log, []

    def checked(event: LogEvent, *args: object, exc: BaseException | None = None, **fields: Any) -> None:
        given = {*fields, "exc_info"} if exc is not None else {*fields}
        known = set(event.fields)
        if not known - event.optional_fields <= given <= known or len(args) != event.message.count("%s"):
            wrong.append(f"{event.name} was logged with {sorted(given)} and {len(args)} arguments")
        log(event, *args, exc=exc, **fields)

    monkeypatch.setattr(LogEvent, "log", checked)
    yield
    assert wrong == []


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def backend() -> AsyncIterator[Backend]:
    async with serving_backend() as served:
        yield served


@pytest.fixture
async def open_house(tmp_path: Path, backend: Backend, clock: Clock) -> AsyncIterator[Open]:
    """Opens sidecars that are closed at the end of the test."""
    async with AsyncExitStack() as stack:

        async def open_one(**options: Any) -> House:
            options.setdefault("folder", tmp_path)
            return await stack.enter_async_context(opened(backend=backend, clock=clock, **options))

        yield open_one


@pytest.fixture
async def house(open_house: Open) -> House:
    """A sidecar with default settings."""
    return await open_house()

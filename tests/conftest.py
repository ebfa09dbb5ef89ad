"""Fixtures for every folder, and the options `--shuffle` and `--hypothesis-profile`."""

from __future__ import annotations

import math
import random
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from types import NoneType
from typing import Any

import pytest
from hypothesis import settings

from sidecar.telemetry.events import LogEvent
from sidecar.web.serving.listener import raise_file_limit
from tests.support import Backend, Clock, House, Open, opened, serving_backend

# Its assertions say what differs, as those of the tests do.
pytest.register_assert_rewrite("tests.interfaces")

# Tests open hundreds of connections with both ends in one process.
raise_file_limit()
# A shell starts background jobs with SIGINT ignored, and nohup ignores SIGHUP. Programs that tests start
# would inherit that. They do not inherit a handler, and with a handler the run still survives the hangup.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)

# The default has few examples, the same in every run. CI runs more of them: `-m hypothesis` selects the tests
# that have examples. `--hypothesis-profile thorough` looks for new ones.
settings.register_profile("everyday", max_examples=30, deadline=None, derandomize=True)
settings.register_profile("ci", parent=settings.get_profile("everyday"), max_examples=200)
settings.register_profile("thorough", max_examples=3_000, deadline=None)
settings.load_profile("everyday")


def is_plain(value: object) -> bool:
    """Whether every way to write it as JSON writes the same."""
    return type(value) in (str, int, bool, NoneType) or (type(value) is float and math.isfinite(value))


@pytest.fixture(autouse=True)
def every_log_line_carries_the_fields_of_its_event(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Holds the calls to the table of events and to the kinds of values, whatever the test is about."""
    log, log_fields, wrong = LogEvent.log, LogEvent.log_fields, []

    def check(event: LogEvent, args: int, fields: dict[str, Any], *more: str) -> None:
        given, known = {*fields, *more}, set(event.fields)
        if not known - event.optional_fields <= given <= known or args != event.message.count("%s"):
            wrong.append(f"{event.name} was logged with {sorted(given)} and {args} arguments")
        wrong.extend(
            f"{event.name} was logged with {name}={value!r}"
            for name, value in fields.items()
            if not is_plain(value) and not (type(value) in (list, tuple) and all(map(is_plain, value)))
        )

    def checked(event: LogEvent, *args: object, exc: BaseException | None = None, **fields: Any) -> None:
        check(event, len(args), fields, *([] if exc is None else ["exc_info"]))
        log(event, *args, exc=exc, **fields)

    def checked_fields(event: LogEvent, fields: dict[str, Any]) -> None:
        check(event, 0, fields)
        log_fields(event, fields)

    monkeypatch.setattr(LogEvent, "log", checked)
    monkeypatch.setattr(LogEvent, "log_fields", checked_fields)
    yield
    assert wrong == []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shuffle",
        type=int,
        metavar="SEED",
        help="run the files, and the tests of each file, in random order",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seed = config.getoption("shuffle")
    if seed is None:
        return
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    draw = random.Random(seed)  # the same order in every xdist worker
    for tests in files.values():
        draw.shuffle(tests)
    items[:] = [test for path in draw.sample(list(files), len(files)) for test in files[path]]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def backend() -> AsyncIterator[Backend]:
    async with serving_backend() as served:
        yield served


@pytest.fixture
async def open_house(tmp_path: Path, backend: Backend, clock: Clock) -> AsyncIterator[Open]:
    """Opens sidecars and closes them at the end of the test."""
    async with AsyncExitStack() as stack:

        async def open_one(**options: Any) -> House:
            options.setdefault("folder", tmp_path)
            return await stack.enter_async_context(opened(backend=backend, clock=clock, **options))

        yield open_one


@pytest.fixture
async def house(open_house: Open) -> House:
    """A sidecar with default settings."""
    return await open_house()

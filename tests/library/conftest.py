"""A new store of the embedding program for each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sidecar.library import actions
from sidecar.library.actions import Action
from sidecar.library.runtime import configure


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """The SQLite file of `store_url`."""
    return tmp_path / "library.db"


@pytest.fixture(params=["memory", "sqlite"])
def store_url(request: pytest.FixtureRequest, database: Path) -> Iterator[str]:
    """A new store of each kind, configured. The default is configured again after the test."""
    url = "memory://" if request.param == "memory" else f"sqlite:///{database}"
    configure(url)
    yield url
    configure()


@pytest.fixture(autouse=True)
def registered_actions() -> Iterator[dict[str, Action]]:
    """The callables that a test registers. There are none before it and none after it."""
    actions._registered.clear()
    yield actions._registered
    actions._registered.clear()


Reconfigure = Callable[..., None]


@pytest.fixture
def reconfigure(store_url: str, tmp_path: Path) -> Reconfigure:
    """Opens the store again, as a restart does, with or without a catalogue (`{name: {risk: ...}, ...}`)."""

    def again(catalogue: str | None = None, **options: Any) -> None:
        if catalogue is not None:
            folder = options["policies"] = tmp_path / "policies"
            folder.mkdir(exist_ok=True)
            (folder / "actions.yaml").write_text(f"actions: {catalogue}\n", encoding="utf-8")
        configure()  # the same file again would stay open
        configure(store_url, **options)

    return again

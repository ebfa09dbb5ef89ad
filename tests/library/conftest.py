"""The store of the embedding program, fresh for each test of this folder."""

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
    """Where the SQLite file of `store_url` is."""
    return tmp_path / "library.db"


@pytest.fixture(params=["memory", "sqlite"])
def store_url(request: pytest.FixtureRequest, database: Path) -> Iterator[str]:
    """A fresh store of each kind in turn, configured; afterwards the default is back."""
    url = "memory://" if request.param == "memory" else f"sqlite:///{database}"
    configure(url)
    yield url
    configure()


@pytest.fixture(autouse=True)
def registered_actions() -> Iterator[dict[str, Action]]:
    """The callables that a test registers; none before, none after."""
    actions._registered.clear()
    yield actions._registered
    actions._registered.clear()


Reconfigure = Callable[..., None]


@pytest.fixture
def reconfigure(store_url: str, tmp_path: Path) -> Reconfigure:
    """Opens the store again, as a restart does, with a catalogue (`{name: {risk: ...}, ...}`) or without."""

    def again(catalogue: str | None = None, **options: Any) -> None:
        if catalogue is not None:
            folder = options["policies"] = tmp_path / "policies"
            folder.mkdir(exist_ok=True)
            (folder / "actions.yaml").write_text(f"actions: {catalogue}\n", encoding="utf-8")
        configure()  # the same file again would stay open
        configure(store_url, **options)

    return again

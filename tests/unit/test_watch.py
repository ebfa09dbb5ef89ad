"""Changes of configuration and policies are found, however they are made."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from sidecar.clock import wall_clock
from sidecar.live import reload
from sidecar.live.reload import Files, Reloader
from sidecar.live.snapshot import Live, Snapshot
from sidecar.telemetry.metrics import Metrics

# From the change until it is in force; an operator waits for it.
MOST_SECONDS = 5.0
CONFIG = "upstream: {url: http://127.0.0.1:9000}\npolicies: policies/\n"


def actions(name: str) -> str:
    """A policy file. Those of names of the same length have the same size."""
    return f"actions: {{{name}: {{risk: low}}}}\n"


def same_times(path: Path, like: os.stat_result) -> None:
    os.utime(path, ns=(like.st_atime_ns, like.st_mtime_ns))


def replaced(path: Path, text: str) -> None:
    """As an editor does: a new file takes the place of the old one."""
    path.with_name(f".{path.name}.swp").write_text(text)
    os.replace(path.with_name(f".{path.name}.swp"), path)


def linked(link: Path, target: str) -> None:
    """A link takes the place of another one, as Kubernetes and deployment tools do it."""
    with suppress(FileNotFoundError):
        os.unlink(link.with_name(f"{link.name}_tmp"))
    os.symlink(target, link.with_name(f"{link.name}_tmp"))
    os.replace(link.with_name(f"{link.name}_tmp"), link)


class Noticed:
    """A reloader that watches its files."""

    def __init__(self, files: Files) -> None:
        loaded, policies, _ = files.read()
        self.files = files
        self.live = Live(Snapshot(loaded.settings, policies))
        self.reloader = Reloader(files, live=self.live, metrics=Metrics(), clock=wall_clock)

    def _names(self) -> list[str]:
        if self.reloader.last.errors or self.live.snapshot.policies is None:
            return []
        return sorted(self.live.snapshot.policies.actions)

    async def until(self, *names: str) -> None:
        """Wait until the policies in force name these actions; without names, until a reload is refused."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        while self._names() != sorted(names):
            assert loop.time() < begun + MOST_SECONDS, f"not noticed: {self.reloader.last}"
            await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(reload, "SETTLE_SECONDS", 0.05)


@asynccontextmanager
async def watching(config: Path) -> AsyncIterator[Noticed]:
    """Files that were read and are watched now."""
    noticed = Noticed(Files(config, environment={}))
    task = asyncio.create_task(noticed.reloader.watch())
    try:
        yield noticed
        assert not task.done()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "actions.yaml").write_text(actions("one"))
    (tmp_path / "c.yaml").write_text(CONFIG)
    return tmp_path / "c.yaml"


# How files change ---------------------------------------------------------------------------------------


def rewrite(folder: Path, name: str) -> None:
    (folder / "policies" / "actions.yaml").write_text(actions(name))


def rewrite_unnoticeably(folder: Path, name: str) -> None:
    """Same file, same size, same times."""
    file = folder / "policies" / "actions.yaml"
    before = file.stat()
    file.write_text(actions(name))
    same_times(file, before)
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def replace(folder: Path, name: str) -> None:
    replaced(folder / "policies" / "actions.yaml", actions(name))


def delete_and_add(folder: Path, name: str) -> None:
    for file in (folder / "policies").iterdir():
        file.unlink()
    (folder / "policies" / f"{name}.yml").write_text(actions(name))


def other_folder(folder: Path, name: str) -> None:
    """The configuration names another folder from now on."""
    (folder / name).mkdir()
    (folder / name / "actions.yaml").write_text(actions(name))
    replaced(folder / "c.yaml", CONFIG.replace("policies/", f"{name}/"))


def remove_and_recreate(folder: Path, name: str) -> None:
    shutil.rmtree(folder / "policies")
    (folder / "policies").mkdir()
    rewrite(folder, name)


def rename_folder(folder: Path, name: str) -> None:
    (folder / name).mkdir()
    (folder / name / "actions.yaml").write_text(actions(name))
    os.rename(folder / "policies", folder / f"before-{name}")
    os.rename(folder / name, folder / "policies")


@pytest.mark.parametrize(
    "change",
    [
        rewrite,
        rewrite_unnoticeably,
        replace,
        delete_and_add,
        other_folder,
        remove_and_recreate,
        rename_folder,
    ],
)
async def test_a_change_is_noticed_and_so_is_the_next_one(
    config: Path, change: Callable[[Path, str], None]
) -> None:
    async with watching(config) as noticed:
        for name in ("two", "six", "ten"):
            change(config.parent, name)
            await noticed.until(name)


async def test_a_change_after_a_folder_was_exchanged_is_noticed(config: Path) -> None:
    async with watching(config) as noticed:
        for number, change in enumerate((remove_and_recreate, rename_folder, other_folder)):
            change(config.parent, f"away-{number}")
            await noticed.until(f"away-{number}")
            folder = noticed.files.policies
            assert folder is not None
            (folder / "actions.yaml").write_text(actions(f"again-{number}"))
            await noticed.until(f"again-{number}")


def config_map(folder: Path, name: str, number: int, *parts: str) -> None:
    """What the kubelet does: a folder of its own for each version, and one rename to show it. The files of
    all versions have the same times."""
    version = folder / f"..2026_{number}"
    for part in parts:
        (version / part).parent.mkdir(parents=True, exist_ok=True)
        (version / part).write_text(CONFIG if part == "c.yaml" else actions(name))
        os.utime(version / part, ns=(0, 0))
    os.utime(version, ns=(0, 0))
    linked(folder / "..data", version.name)
    for part in parts:
        top = part.split("/")[0]
        if not (folder / top).exists():
            os.symlink(f"..data/{top}", folder / top)
    if number:
        shutil.rmtree(folder / f"..2026_{number - 1}")


async def test_the_swap_of_a_config_map_of_policies_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    policies = tmp_path / "policies"
    config_map(policies, "zero", 0, "actions.yaml")
    async with watching(tmp_path / "c.yaml") as noticed:
        for number in (1, 2, 3):
            config_map(policies, f"name{number}", number, "actions.yaml")
            await noticed.until(f"name{number}")


async def test_the_swap_of_a_config_map_of_everything_is_noticed(tmp_path: Path) -> None:
    config_map(tmp_path, "zero", 0, "c.yaml", "policies/actions.yaml")
    assert (tmp_path / "policies").is_symlink()
    async with watching(tmp_path / "c.yaml") as noticed:
        for number in (1, 2, 3):
            config_map(tmp_path, f"name{number}", number, "c.yaml", "policies/actions.yaml")
            await noticed.until(f"name{number}")


async def test_the_swap_of_a_folder_that_is_a_link_is_noticed(config: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "policies")
    releases = tmp_path / "releases"
    for name in ("one", "two", "six"):
        (releases / name).mkdir(parents=True)
        (releases / name / "actions.yaml").write_text(actions(name))
        os.utime(releases / name / "actions.yaml", ns=(0, 0))
    linked(tmp_path / "policies", "releases/one")
    async with watching(config) as noticed:
        for name in ("two", "six", "one"):
            linked(tmp_path / "policies", f"releases/{name}")
            await noticed.until(name)
            (releases / name / "actions.yaml").write_text(actions(f"{name}-edited"))
            await noticed.until(f"{name}-edited")
            (releases / name / "actions.yaml").write_text(actions(name))
            await noticed.until(name)


async def test_a_configuration_behind_a_link_is_noticed_when_it_is_edited(config: Path) -> None:
    elsewhere = config.parent / "elsewhere"
    elsewhere.mkdir()
    os.rename(config, elsewhere / "real.conf")
    os.symlink("elsewhere/real.conf", config)
    async with watching(config) as noticed:
        for name in ("two", "six"):
            (config.parent / name).mkdir()
            (config.parent / name / "actions.yaml").write_text(actions(name))
            (elsewhere / "real.conf").write_text(CONFIG.replace("policies/", f"{name}/"))
            await noticed.until(name)


async def test_a_link_further_up_the_path_is_noticed(tmp_path: Path) -> None:
    for name in ("one", "two", "six"):
        folder = tmp_path / "checkouts" / name / "deep" / "policies"
        folder.mkdir(parents=True)
        (folder / "actions.yaml").write_text(actions(name))
    linked(tmp_path / "current", "checkouts/one")
    (tmp_path / "etc").mkdir()
    config = tmp_path / "etc" / "c.yaml"
    config.write_text(CONFIG.replace("policies/", f"{tmp_path}/current/deep/policies"))
    async with watching(config) as noticed:
        for name in ("two", "six"):
            linked(tmp_path / "current", f"checkouts/{name}")
            await noticed.until(name)


async def test_a_folder_that_goes_and_comes_back_is_watched_again(config: Path) -> None:
    async with watching(config) as noticed:
        for name in ("two", "six"):
            shutil.rmtree(config.parent / "policies")
            await noticed.until()
            await asyncio.sleep(0.2)
            (config.parent / "policies").mkdir()
            rewrite(config.parent, name)
            await noticed.until(name)
            rewrite(config.parent, f"{name}-edited")
            await noticed.until(f"{name}-edited")


async def test_a_folder_that_is_not_there_yet_is_watched_once_it_is(config: Path) -> None:
    async with watching(config) as noticed:
        replaced(config, CONFIG.replace("policies/", "to/come/"))
        await noticed.until()
        (config.parent / "to" / "come").mkdir(parents=True)
        (config.parent / "to" / "come" / "actions.yaml").write_text(actions("six"))
        await noticed.until("six")


async def test_everything_may_go_and_come_back(tmp_path: Path, config: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for name in ("c.yaml", "policies"):
        os.rename(tmp_path / name, home / name)
    async with watching(home / "c.yaml") as noticed:
        os.rename(home, tmp_path / "away")
        await noticed.until()
        rewrite(tmp_path / "away", "six")
        os.rename(tmp_path / "away", home)
        await noticed.until("six")
        rewrite(home, "ten")
        await noticed.until("ten")


# What is no change --------------------------------------------------------------------------------------


async def test_files_that_hold_what_they_held_are_not_read_again(config: Path) -> None:
    async with watching(config) as noticed:
        before = noticed.reloader.last
        rewrite(config.parent, "one")
        replace(config.parent, "one")
        os.utime(config)
        for name in ("store.db-wal", "policies/README.md", ".c.yaml.swp", "policies/.actions.yaml.swp"):
            (config.parent / name).write_text("x")
        for _ in range(3):
            await noticed.reloader.catch_up()
        assert noticed.reloader.last is before
        rewrite(config.parent, "two")
        await noticed.until("two")

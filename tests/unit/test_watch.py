"""Changes of configuration and policies are noticed, however they are made, with notices and without."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from sidecar.files.faults import ConfigurationError
from sidecar.live import watch
from sidecar.live.reload import Files

# From the change until it was noticed (policies.md wants a reload on change; an operator waits for it).
MOST_SECONDS = 2.0
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
    """Reads the files anew whenever they changed, and remembers what the policies then named."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.looks = 0
        self.read: list[list[str]] = []

    async def look(self) -> None:
        self.looks += 1
        if await asyncio.to_thread(self.files.changed):
            try:
                _, policies = await asyncio.to_thread(self.files.read)
                self.read.append(sorted(policies.actions))
            except ConfigurationError:
                self.read.append([])

    async def begun(self) -> None:
        async with asyncio.timeout(MOST_SECONDS):
            while self.looks == 0:
                await asyncio.sleep(0.005)

    async def until(self, *names: str) -> float:
        """The seconds until the policies were read as naming these actions."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        while not self.read or self.read[-1] != sorted(names):
            assert loop.time() < begun + MOST_SECONDS, f"not noticed within {MOST_SECONDS} s: {self.read}"
            await asyncio.sleep(0.005)
        return loop.time() - begun


@asynccontextmanager
async def watching(config: Path) -> AsyncIterator[Noticed]:
    """Files that were read and are watched now."""
    files = Files(config, environment={})
    files.read()
    noticed = Noticed(files)
    task = asyncio.create_task(watch.watch(files, noticed.look))
    try:
        await noticed.begun()
        yield noticed
        assert not task.done()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@pytest.fixture(params=["notices", "polling"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How changes are found: by notices alone, or by looking alone."""
    if request.param == "notices":
        monkeypatch.setattr(watch, "LOOK_SECONDS", 3600.0)
        monkeypatch.delenv("WATCHFILES_FORCE_POLLING", raising=False)
    else:
        monkeypatch.setenv("WATCHFILES_FORCE_POLLING", "true")
        monkeypatch.setattr(watch, "POLL_SECONDS", 0.1)  # so that the tests do not wait for so long
    return str(request.param)


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
    way: str, config: Path, change: Callable[[Path, str], None]
) -> None:
    async with watching(config) as noticed:
        for name in ("two", "six", "ten"):
            change(config.parent, name)
            await noticed.until(name)


async def test_a_change_after_a_folder_was_exchanged_is_noticed(way: str, config: Path) -> None:
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


async def test_the_swap_of_a_config_map_of_policies_is_noticed(way: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    policies = tmp_path / "policies"
    config_map(policies, "zero", 0, "actions.yaml")
    async with watching(tmp_path / "c.yaml") as noticed:
        for number in (1, 2, 3):
            config_map(policies, f"name{number}", number, "actions.yaml")
            await noticed.until(f"name{number}")


async def test_the_swap_of_a_config_map_of_everything_is_noticed(way: str, tmp_path: Path) -> None:
    config_map(tmp_path, "zero", 0, "c.yaml", "policies/actions.yaml")
    assert (tmp_path / "policies").is_symlink()
    async with watching(tmp_path / "c.yaml") as noticed:
        for number in (1, 2, 3):
            config_map(tmp_path, f"name{number}", number, "c.yaml", "policies/actions.yaml")
            await noticed.until(f"name{number}")


async def test_the_swap_of_a_folder_that_is_a_link_is_noticed(way: str, config: Path, tmp_path: Path) -> None:
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


async def test_a_configuration_behind_a_link_is_noticed_when_it_is_edited(way: str, config: Path) -> None:
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


async def test_a_link_further_up_the_path_is_noticed_without_a_notice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WATCHFILES_FORCE_POLLING", raising=False)
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


async def test_a_folder_that_goes_and_comes_back_is_watched_again(way: str, config: Path) -> None:
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


async def test_a_folder_that_is_not_there_yet_is_watched_once_it_is(way: str, config: Path) -> None:
    async with watching(config) as noticed:
        replaced(config, CONFIG.replace("policies/", "to/come/"))
        await noticed.until()
        (config.parent / "to" / "come").mkdir(parents=True)
        (config.parent / "to" / "come" / "actions.yaml").write_text(actions("six"))
        await noticed.until("six")


async def test_everything_may_go_and_come_back(way: str, tmp_path: Path, config: Path) -> None:
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


async def test_files_that_hold_what_they_held_are_not_read_again(way: str, config: Path) -> None:
    async with watching(config) as noticed:
        looks = noticed.looks
        rewrite(config.parent, "one")
        replace(config.parent, "one")
        os.utime(config)
        await asyncio.sleep(0.4)
        assert noticed.looks > looks
        assert noticed.read == []


async def test_other_files_beside_them_wake_nobody(monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    monkeypatch.setattr(watch, "LOOK_SECONDS", 3600.0)
    monkeypatch.delenv("WATCHFILES_FORCE_POLLING", raising=False)
    async with watching(config) as noticed:
        looks = noticed.looks
        for name in ("store.db-wal", "policies/README.md", ".c.yaml.swp", "policies/.actions.yaml.swp"):
            (config.parent / name).write_text("x")
        await asyncio.sleep(0.5)
        assert noticed.looks == looks
        rewrite(config.parent, "two")
        await noticed.until("two")


# Without notices, and the end -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "polls"), [("true", True), ("1", True), ("", False), ("FALSE", False), ("disable", False)]
)
async def test_the_variable_of_watchfiles_is_obeyed(
    monkeypatch: pytest.MonkeyPatch, config: Path, text: str, polls: bool
) -> None:
    monkeypatch.setenv("WATCHFILES_FORCE_POLLING", text)
    monkeypatch.setattr(watch, "LOOK_SECONDS", 3600.0)
    async with watching(config) as noticed:
        looks = noticed.looks
        await asyncio.sleep(watch.POLL_SECONDS + 0.2)
        assert (noticed.looks > looks) == polls


async def test_where_no_notices_are_to_be_had_it_polls_and_says_so(
    monkeypatch: pytest.MonkeyPatch, config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("WATCHFILES_FORCE_POLLING", raising=False)
    monkeypatch.setattr(watch, "LOOK_SECONDS", 3600.0)
    async with watching(config):
        pass  # so that everything that takes a file has taken it
    files = Files(config, environment={})
    files.read()
    noticed = Noticed(files)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def look() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await noticed.look()

    caplog.set_level(logging.WARNING, "scopegate.reload")
    # Until the first look not one more file can be opened, so no notices can be ordered.
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    task = asyncio.create_task(watch.watch(files, look))
    try:
        await noticed.begun()
        for change, name in ((rewrite_unnoticeably, "two"), (replace, "six")):
            change(config.parent, name)
            await noticed.until(name)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    (told,) = caplog.messages
    assert "twice a second" in told


def ordered() -> int:
    """How many of the system's notice boards are open."""
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return sum(link.is_symlink() and os.readlink(link) == "anon_inode:inotify" for link in links)


async def test_it_ends_at_once_and_leaves_nothing_open(way: str, config: Path) -> None:
    loop = asyncio.get_running_loop()
    before = ordered()
    async with watching(config) as noticed:
        assert (ordered() > before) == (way == "notices")
        for number in range(5):
            remove_and_recreate(config.parent, f"name{number}")
            await noticed.until(f"name{number}")
        begun = loop.time()
    assert loop.time() - begun < 0.5
    while ordered() > before:
        assert loop.time() - begun < 1.0
        await asyncio.sleep(0.01)

"""One owner per database, whatever becomes of the file beside it and by whatever name it is opened."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sidecar.core.command import Issued
from sidecar.errors import StoreUnavailable
from sidecar.store._ownership import Ownership
from sidecar.store.checkpoints import append, writers
from sidecar.store.sqlite import SqliteEngine
from tests.store.conftest import OpenStore, issue

ROOT = Path(__file__).parents[2]

OPENS = """
    import asyncio, sys
    from pathlib import Path
    from sidecar.errors import StoreUnavailable
    from sidecar.store.sqlite import SqliteEngine
    async def main():
        engine = SqliteEngine(Path(sys.argv[1]))
        try:
            await engine.open()
        except StoreUnavailable as exc:
            print(exc)
        else:
            print("opened")
            await engine.close()
    asyncio.run(main())
"""


def elsewhere(program: str, path: Path) -> str:
    """What another process prints."""
    words = [sys.executable, "-c", textwrap.dedent(program), str(path)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "gate.db"


@pytest.mark.parametrize("way", ["same name", "hard link", "symbolic link"])
@pytest.mark.parametrize("inside", [False, True], ids=["another process", "the same process"])
async def test_a_second_owner_is_turned_away_though_the_lock_file_is_gone(
    open_store: OpenStore, path: Path, tmp_path: Path, way: str, inside: bool
) -> None:
    store = await open_store(path)
    os.unlink(f"{path}.lock")
    other = path
    if way == "hard link":
        other = tmp_path / "other" / "linked.db"
        other.parent.mkdir()
        os.link(path, other)
    elif way == "symbolic link":
        other = tmp_path / "linked.db"
        other.symlink_to(path)
    if inside:
        with pytest.raises(StoreUnavailable, match="in use by this process"):
            await SqliteEngine(other).open()
    else:
        assert "in use by another process" in elsewhere(OPENS, other)
    assert isinstance(await store.submit(issue()), Issued)
    await store.close()
    assert elsewhere(OPENS, path) == "opened\n"


async def test_being_turned_away_takes_no_lock_from_the_owner_in_the_same_process(
    open_store: OpenStore, path: Path
) -> None:
    """Closing any descriptor of the database would drop the locks that SQLite holds on it."""
    await open_store(path)
    held = locks_of(path)
    assert held
    for _ in range(3):
        os.unlink(f"{path}.lock")
        with pytest.raises(StoreUnavailable):
            await SqliteEngine(path).open()
    assert locks_of(path) == held


async def test_a_checkpoint_file_that_is_the_database_is_never_opened(
    open_store: OpenStore, path: Path, tmp_path: Path
) -> None:
    await open_store(path)
    held = locks_of(path)
    os.link(path, tmp_path / "checkpoints")
    for name in (path, tmp_path / "checkpoints"):
        with pytest.raises(OSError, match="the database itself"):
            append(name, b"{}\n")
        with pytest.raises(OSError, match="the database itself"):
            writers(name)
    assert locks_of(path) == held


def locks_of(path: Path) -> list[str]:
    """The locks of this process on a file, as the kernel lists them."""
    inode = os.stat(path).st_ino
    found = (line.split()[1:] for line in Path("/proc/locks").read_text().splitlines())
    return sorted(
        " ".join(words)
        for words in found
        if words[0] != "->" and words[3] == str(os.getpid()) and words[4].endswith(f":{inode}")
    )


async def test_an_older_release_that_knows_the_lock_file_only_is_kept_out_and_keeps_out(
    open_store: OpenStore, path: Path
) -> None:
    older = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(older, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.pwrite(older, b"4711\n", 0)
    with pytest.raises(StoreUnavailable, match=r"in use by another process \(pid 4711\)"):
        await SqliteEngine(path).open()
    os.close(older)
    await open_store(path)
    newer = os.open(f"{path}.lock", os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(newer, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(newer)


async def test_the_owner_is_another_one_as_soon_as_the_first_has_let_go(path: Path) -> None:
    for _ in range(3):
        engine = SqliteEngine(path)
        await engine.open()
        await engine.close()


def test_a_database_that_was_replaced_is_another_database(path: Path) -> None:
    first, second = Ownership(path), Ownership(path)
    first.take()
    os.unlink(path)
    os.unlink(f"{path}.lock")
    second.take()
    assert first.inode != second.inode
    second.release()
    first.release()


def test_no_descriptor_stays_open_where_a_database_cannot_be_taken(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    first = Ownership(path)
    first.take()
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            Ownership(path).take()
    first.release()
    assert len(os.listdir("/proc/self/fd")) == before

"""One owner per database: the locks that keep a second process, or a second store, out of its file.

SQLite before 3.51.3 can corrupt a WAL database that two connections write or checkpoint, and what the writer
knows by heart (the end of the chain, what brakes count) is true only while nothing else writes.

1. A lock on a file beside the database keeps out every release of Scopegate that ever was. But that file can
   be removed, and a hard link or another mount of the database has another file beside it.
2. So the database's own inode is locked, too, with `flock`: it is the same by whatever name the database is
   opened. On Linux `flock` and the `fcntl` locks of SQLite do not see each other. On systems where they do
   (the BSDs, macOS) the lock would keep SQLite itself out, and only the file beside it is locked.
3. POSIX drops all `fcntl` locks that a process holds on a file as soon as the process closes *any* descriptor
   of that file. So the descriptor that holds the lock is closed only after SQLite's connections, and nothing
   else in this process opens the database but SQLite, which knows of this: sizes and identities are taken
   with `stat`. A second store in the same process must be turned away before it opens the file, because
   being turned away would mean to close it: hence the table of what this process owns.
4. On NFS, Linux makes `flock` a lock of the server's, where it may collide with those of SQLite; the store
   then does not open. A database belongs on a local disk.
5. A fork shares the descriptors: a child lets go of its copies, which releases nothing of its parent's.
"""

from __future__ import annotations

import fcntl
import os
import sys
import threading
from pathlib import Path

from sidecar.errors import StoreUnavailable

Inode = tuple[int, int]

# What this process owns, and the lock without which nothing is looked up there or opened.
_owned: set[Inode] = set()
_taking = threading.Lock()


def _forget() -> None:
    global _taking
    _taking = threading.Lock()
    _owned.clear()


os.register_at_fork(after_in_child=_forget)


class Ownership:
    """The claim of one store on one database file. The path is one without symbolic links."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._beside: int | None = None
        self._database: int | None = None
        self.inode: Inode | None = None

    def take(self) -> None:
        """Take the database, which is made where it is not there. Raises StoreUnavailable and OSError."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with _taking:
            try:
                self._lock_beside()
                self._lock_database()
            except BaseException:
                self._close()
                raise
            assert self._beside is not None
            os.ftruncate(self._beside, 0)
            os.pwrite(self._beside, f"{os.getpid()}\n".encode(), 0)

    def _lock_beside(self) -> None:
        self._beside = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._beside, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            owner = os.pread(self._beside, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise self._in_use(f"another process (pid {owner})") from exc

    def _lock_database(self) -> None:
        if _inode_at(self._path) in _owned:
            raise self._in_use("this process")
        # Scopes are permissions: only the owner reads the file.
        self._database = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        inode = _inode(os.fstat(self._database))
        if inode in _owned:
            # Put there between the look and the opening. It stays open, because closing it would unlock what
            # the owner has.
            self._database = None
            raise self._in_use("this process")
        if sys.platform == "linux":
            try:
                fcntl.flock(self._database, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise self._in_use("another process, perhaps under another name") from exc
        _owned.add(inode)
        self.inode = inode

    def _in_use(self, owner: str) -> StoreUnavailable:
        return StoreUnavailable(f"the database {self._path} is in use by {owner}; one owns it at a time")

    def release(self) -> None:
        """Let go of the database. SQLite's connections to it must be closed, or be another process's."""
        with _taking:
            self._close()

    def _close(self) -> None:
        if self.inode is not None:
            _owned.discard(self.inode)
        for number in (self._database, self._beside):
            if number is not None:
                os.close(number)
        self._database = self._beside = self.inode = None


def is_owned(path: Path) -> bool:
    """Whether a path names a database that this process owns, which only SQLite may open and close here."""
    return _inode_at(path) in _owned


def _inode_at(path: Path) -> Inode | None:
    try:
        return _inode(os.stat(path))
    except FileNotFoundError:
        return None


def _inode(found: os.stat_result) -> Inode:
    return found.st_dev, found.st_ino

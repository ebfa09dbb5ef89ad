"""One owner per database: locks that keep a second process, or a second store, out of the file.

SQLite before 3.51.3 can corrupt a WAL database that two connections write or checkpoint. The writer also
caches state (the end of the chain, the counts of brakes) that is true only while nothing else writes.

1. A lock on a file beside the database works against every release of Scopegate. But that file can be
   removed, and a hard link or another mount of the database has a different file beside it.
2. So `flock` also locks the database's own inode, which is the same under every name of the database. On
   Linux `flock` and the `fcntl` locks of SQLite do not see each other. On systems where they do (the BSDs,
   macOS) the lock would keep SQLite itself out, so only the file beside the database is locked there.
3. POSIX drops all `fcntl` locks that a process holds on a file as soon as the process closes *any* descriptor
   of that file. So the descriptor with the lock is closed only after SQLite's connections. Only SQLite, which
   handles this rule, opens the database otherwise; sizes and identities come from `stat`. A second store in
   the same process must be rejected before it opens the file, because a rejected store would close it. The
   table of owned inodes serves this purpose.
4. On NFS, Linux turns `flock` into a lock on the server, where it may collide with the locks of SQLite. Then
   the store does not open. A database belongs on a local disk.
5. A fork shares the descriptors. A child closes its copies, which does not release the locks of its parent.
"""

from __future__ import annotations

import fcntl
import os
import sys
import threading
from pathlib import Path

from sidecar.errors import StoreUnavailable

Inode = tuple[int, int]

# The inodes of the databases that this process owns. `_taking` guards both the set and the opening of a file.
_owned: set[Inode] = set()
_taking = threading.Lock()


def _forget() -> None:
    global _taking
    _taking = threading.Lock()
    _owned.clear()


os.register_at_fork(after_in_child=_forget)


class Ownership:
    """The locks of one store on one database file. The path must not contain symbolic links."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._beside: int | None = None
        self._database: int | None = None
        self.inode: Inode | None = None

    def take(self) -> None:
        """Lock the database, and create it if it does not exist. Raises StoreUnavailable and OSError."""
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
        # Scopes are permissions, so only the owner may read the file.
        self._database = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        inode = _inode(os.fstat(self._database))
        if inode in _owned:
            # The file was put there between the check and the opening. The descriptor stays open, because
            # closing it would drop the locks of the owner.
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
        """Release the locks. SQLite's connections to it must be closed, or belong to another process."""
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
    """Whether this process owns the database at a path. Only SQLite may open and close such a file here."""
    return _inode_at(path) in _owned


def _inode_at(path: Path) -> Inode | None:
    try:
        return _inode(os.stat(path))
    except FileNotFoundError:
        return None


def _inode(found: os.stat_result) -> Inode:
    return found.st_dev, found.st_ino

"""A log that cannot be opened is told in one sentence, never in a traceback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from sidecar.errors import StoreUnavailable
from sidecar.store.logfile import opened

NOBODY = 65534


@pytest.fixture
def closed() -> Iterator[Path]:
    """A folder that holds something and that nobody may enter; root only becomes nobody for a while."""
    before = os.geteuid()
    with TemporaryDirectory() as folder:
        (Path(folder) / "scopegate.db").touch()
        os.chmod(folder, 0)
        if before == 0:
            os.seteuid(NOBODY)
        try:
            yield Path(folder)
        finally:
            os.seteuid(before)
            os.chmod(folder, 0o700)


def refusal(path: Path) -> str:
    with pytest.raises(StoreUnavailable) as caught, opened(path):
        pass
    return str(caught.value)


def test_a_folder_that_is_closed_hides_whether_there_is_a_log(closed: Path) -> None:
    for name in ("scopegate.db", "other.db"):
        assert refusal(closed / name) == f"cannot read {closed / name}: Permission denied"


def test_what_is_no_folder_holds_no_log(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "scopegate.db"
    assert refusal(path) == f"cannot read {path}: Not a directory"


def test_a_log_that_was_never_begun_is_told_as_such(tmp_path: Path) -> None:
    path = tmp_path / "scopegate.db"
    assert refusal(path) == f"there is no database {path}; has the sidecar run with this configuration?"
    assert not path.exists()

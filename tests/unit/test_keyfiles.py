"""Who may read a file that holds a key."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from sidecar.files import keyfiles
from sidecar.files.keyfiles import KeyFileUnusable

SOMEBODY = 65532
KEY = b"a key of more than sixteen bytes"


@pytest.mark.parametrize("mode", [0o440, 0o640, 0o604, 0o620, 0o700 | 0o010])
def test_a_key_of_ones_own_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "key"
    file.write_bytes(KEY)
    file.chmod(mode)
    with pytest.raises(KeyFileUnusable, match=f"mode {mode:04o}"):
        keyfiles.mask_key(file)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can hand a file of its own to somebody")
@pytest.mark.parametrize(("mode", "usable"), [(0o440, True), (0o640, True), (0o660, False), (0o444, False)])
def test_a_key_that_root_hands_to_ones_group_is_usable_while_only_that_group_reads_it(
    mode: int, usable: bool
) -> None:
    # As a Kubernetes Secret is mounted in a pod with an fsGroup. pytest's own folders are closed to others.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "key"
        file.write_bytes(KEY)
        os.chmod(folder, 0o755)
        os.chown(file, 0, SOMEBODY)
        file.chmod(mode)
        os.setegid(SOMEBODY)
        os.seteuid(SOMEBODY)
        try:
            if usable:
                assert keyfiles.mask_key(file) == KEY
            else:
                with pytest.raises(KeyFileUnusable, match=f"mode {mode:04o}"):
                    keyfiles.mask_key(file)
        finally:
            os.seteuid(0)
            os.setegid(0)

"""Programs that some tests need beside Python; without one its tests skip, or fail where it is required."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DOWNLOAD_SECONDS = 120.0

# Where packages of Python put programs, before wherever the system has them.
_PLACES = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin"])


def tool(name: str) -> str:
    """The path of a program. Skips the test without it; fails it if TEST_TOOLS is `required`."""
    found = shutil.which(name, path=_PLACES)
    if found is None:
        told = f"needs the program {name}, which is not installed here"
        if os.environ.get("TEST_TOOLS") == "required":
            pytest.fail(told)
        pytest.skip(told)
    return found


def downloads(command: list[str], folder: Path | None = None) -> None:
    """Install packages that only some tests need. Skips the test unless TEST_TOOLS is `required`."""
    if os.environ.get("TEST_TOOLS") != "required":
        pytest.skip(f"{Path(command[0]).name} would download packages; set TEST_TOOLS=required for that")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}{done.stderr}")

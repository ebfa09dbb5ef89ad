"""Where the configuration file is, if a command does not name it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sidecar.settings.variables import CONFIG

VARIABLE = CONFIG
FILES = (Path("scopegate.yaml"), Path("/etc/scopegate/scopegate.yaml"))
# For `--help`.
DEFAULT = f"${VARIABLE}, else ./{FILES[0]}, else {FILES[1]}"
NOT_FOUND = (
    f"there is no configuration: {VARIABLE} is not set, and neither ./{FILES[0]} nor {FILES[1]} exists; "
    "give --config FILE"
)


def default_file(environment: Mapping[str, str]) -> Path | None:
    """The file that the environment names, else the first default file that exists, else None."""
    if environment.get(VARIABLE):
        return Path(environment[VARIABLE])
    return next(filter(_is_there, FILES), None)


def _is_there(file: Path) -> bool:
    """Whether a file has this name, even one that cannot be read: another one is of another sidecar."""
    try:
        file.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True

"""The cases that several tests share, as YAML."""

from pathlib import Path
from typing import Any

import yaml


def load_cases(name: str) -> Any:
    """The document of `NAME.yaml` in this folder."""
    return yaml.load((Path(__file__).parent / f"{name}.yaml").read_text("utf-8"), yaml.CSafeLoader)

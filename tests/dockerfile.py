"""The Dockerfile and .dockerignore as values, in as much of their language as they use; more is refused."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

KNOWN = {
    *("ARG", "FROM", "WORKDIR", "COPY", "RUN", "LABEL", "ENV", "USER", "VOLUME", "EXPOSE"),
    *("STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"),
}


class DoesNotHold(Exception):
    """Something about the image is not as it should be."""


@dataclass(frozen=True, slots=True)
class Instruction:
    line: int
    keyword: str
    text: str

    def refuse(self, why: str) -> DoesNotHold:
        return DoesNotHold(f"Dockerfile:{self.line}: {self.keyword} {self.text}: {why}")

    def listed(self) -> list[str]:
        """The words of the exec form. A shell would be the process, and would not pass SIGTERM on."""
        if not self.text.startswith("["):
            raise self.refuse("is not in exec form")
        words = json.loads(self.text)
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise self.refuse("is no list of strings")
        return words


def instructions(text: str) -> list[Instruction]:
    """A Dockerfile's instructions, without comments, with continued lines put together."""
    found: list[Instruction] = []
    begun, first = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or not line.strip():
            continue
        first = number if not begun else first
        begun += line.strip().removesuffix("\\")
        if line.endswith("\\"):
            continue
        keyword, _, rest = begun.partition(" ")
        begun = ""
        instruction = Instruction(first, keyword, rest.strip())
        if keyword not in KNOWN:
            raise instruction.refuse("is an instruction that this script does not know")
        found.append(instruction)
    return found


def pairs(text: str, variables: Mapping[str, str]) -> dict[str, str]:
    """`KEY=VALUE ...`, with variables put in."""
    return dict(expanded(word, variables).split("=", 1) for word in shlex.split(text))


def expanded(text: str, variables: Mapping[str, str]) -> str:
    return re.sub(r"\$(?:(\w+)|{(\w+)})", lambda found: variables[found[1] or found[2]], text)


def context(folder: Path) -> list[str]:
    """The files that .dockerignore lets in: the last pattern that matches one, or a folder above it, says."""
    rules: list[tuple[bool, re.Pattern[str]]] = []
    for line in (folder / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pattern = re.escape(line.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
            rules.append((line.startswith("!"), re.compile(pattern)))
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        above = [str(name), *(str(parent) for parent in name.parents if parent.name)]
        wanted = True
        for allows, rule in rules:
            if any(map(rule.fullmatch, above)):
                wanted = allows
        if wanted and path.is_file():
            found.append(str(name))
    return found

"""The keys of configuration and policies, from their sections: config/scopegate.yaml, and reference tables.

A type, a default, a mark or a text is changed at its key.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from sidecar.policies._sections import ActionSection, RuleSection
from sidecar.settings.keys import Key, Section, keys, without_links
from sidecar.settings.routes import Route
from sidecar.settings.schema import schema_of
from sidecar.settings.sections import Settings
from tests.reference.rooms import summary

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "config/scopegate.yaml"
CONFIGURATION = ROOT / "config/reference/configuration.md"
ROUTES = ROOT / "config/reference/routes.md"
POLICIES = ROOT / "policies/README.md"
PRESETS = ROOT / "sidecar/settings/presets"
KUBERNETES = ROOT / "config/deploy/kubernetes"

WIDTH = 118
HEAD = """\
All keys with their defaults. Only upstream.url has none; every other key may be left out.
config/reference/configuration.md says more about reloads, TLS, Unix sockets and host names.

An unknown key, a wrong type, or a value that YAML versions read differently stops the start, with
file, line and column. A value may contain ${VAR} or ${VAR:default} from the environment. A variable
overrides any key (SCOPEGATE_STORE__URL for store.url), and so does a flag (--set store.url=...);
flags win over variables, and variables over this file. File names are relative to this file, also in
variables and flags. A time is a number of seconds, or a whole number with one unit: 10s, 5m, 2h or 1d.

A running sidecar applies changes of this file and of the policies by itself, each time as a whole or
not at all. It can change the keys marked [live]. All other keys need a restart; such a change is
refused by name."""


def pages() -> dict[Path, str]:
    """Whole files: the configuration with every key, and the copies of shipped files that Kubernetes needs,
    because kustomize reads no file outside its folder."""
    copied = [ROOT / "config/container.yaml", *sorted(ROOT.glob("policies/*.yaml"))]
    copies = {KUBERNETES / file.relative_to(ROOT): file.read_text(encoding="utf-8") for file in copied}
    roles = ROOT / "config/deploy/roles.yaml"
    copies[KUBERNETES / "policies" / roles.name] = roles.read_text(encoding="utf-8")
    return {SHIPPED: "\n".join(shipped()) + "\n", **copies}


def parts() -> dict[tuple[Path, str], str]:
    """Tables of pages that are written by hand, by page and name."""
    rows = (
        f"| `{key.name}` | {_cell(key)} | {'yes' if key.is_live else ''} | {_text(key)} |"
        for key in keys(Settings)
        if not key.section
    )
    table = "\n".join(["| key | default | live | meaning |", "|---|---|---|---|", *rows])
    return {
        (CONFIGURATION, "keys"): table.replace("|  |", "| |"),
        (ROUTES, "routes"): _table("a route", Route),
        (ROUTES, "presets"): _presets(),
        (POLICIES, "actions"): _table("an action", ActionSection),
        (POLICIES, "rules"): _table("a rule", RuleSection),
    }


def _table(name: str, model: type[Section]) -> str:
    rows = (f"| `{key.name}` | {_cell(key)} | {_text(key)} |" for key in keys(model))
    table = "\n".join([f"| key of {name} | default | meaning |", "|---|---|---|", *rows])
    return table.replace("|  |", "| |")


def _presets() -> str:
    """What each preset gates, and the target agents that it reads, as its file says."""
    texts = {file.stem: file.read_text(encoding="utf-8") for file in sorted(PRESETS.glob("*.yaml"))}
    rows = (f"| `{name}` | {summary(text)} | {_on_target_agents(text)} |" for name, text in texts.items())
    return "\n".join(["| preset | what it gates | target agents |", "|---|---|---|", *rows])


def _on_target_agents(source: str) -> str:
    """The sentence about target agents in the comment that a YAML file begins with."""
    paragraphs = source.partition("\n\n")[0].split("\n#\n")
    sentences = (re.split(r"(?<=\.)\s+(?=[A-Z])", each.replace("\n#", "")) for each in paragraphs)
    return next(each.removeprefix("# ") for each in chain(*sentences) if "arget agent" in each)


def _text(key: Key) -> str:
    return key.text.replace("|", "\\|")


def _cell(key: Key) -> str:
    """The default as a file would have it."""
    if key.field.is_required():
        return "required"
    if key.owner.__module__ == RuleSection.__module__:
        # Policy files accept neither null nor an empty value for a key that is left out.
        default = "" if key.section else key.field.get_default()
        return f"`{_written(default)}`" if default or default is False else ""
    return f"`{_written(default_of(key))}`"


def default_of(key: Key) -> Any:
    """A default of the configuration as a file would have it."""
    schema = schema_of(key.owner, title="", description="")["properties"]
    return schema[key.path[-1]].get("default", PydanticUndefined)


def _written(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_written(one)}' for name, one in value.items())}}}"
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9./][A-Za-z0-9_./:-]*", value)
    return str(value) if plain else json.dumps(value)


# config/scopegate.yaml ----------------------------------------------------------------------------------


def shipped() -> Iterator[str]:
    yield "\n#\n".join("\n".join(_comment(paragraph, "")) for paragraph in HEAD.split("\n\n"))
    for key in keys(Settings):
        indent = "  " * (len(key.path) - 1)
        if not indent:
            yield ""
        yield from _comment(_described(key), indent)
        if key.section:
            yield f"{indent}{key.path[-1]}:"
        elif key.name == "gate.routes":
            yield f"{indent}routes:"
            yield from _route(default_of(key)[0], indent + "  ")
        else:
            default = key.field.examples[0] if key.field.examples else default_of(key)
            yield f"{indent}{key.path[-1]}: {_written(default)}"


def _route(given: dict[str, Any], indent: str) -> Iterator[str]:
    """The first route, with all its keys."""
    sign = "- "
    for key in keys(Route):
        value = given.get(key.name, PydanticUndefined)
        if value is PydanticUndefined:
            value = default_of(key)
        # The comment of the first key stands above the item.
        yield from _comment(_described(key), indent + ("" if sign == "- " else "  "))
        yield f"{indent}{sign}{key.name}: {_written(value)}"
        sign = "  "


def _described(key: Key) -> str:
    return without_links(key.text) + (" [live]" if key.is_live else "")


def _comment(text: str, indent: str) -> Iterator[str]:
    width = WIDTH - len(indent) - 2
    for line in textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False):
        yield f"{indent}# {line}"

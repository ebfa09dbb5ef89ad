"""`scopegate routes`: lists the gated routes, shows what becomes of a request, and suggests routes for a
backend."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidecar.cli.options import (
    FAILED,
    answered,
    config_option,
    failed,
    json_option,
    misconfigured,
    pairs,
    set_option,
    tell,
    warn,
)

if TYPE_CHECKING:
    from sidecar.core.unlisted import Access, Treatment
    from sidecar.settings.reading import Loaded
    from sidecar.settings.routes import Route
    from sidecar.web.data.trial import Trial

# The most routes with another path that `match` shows one by one. `--json` has all of them.
_MAX_SHOWN = 10

# The framing is made from --body.
_OWN_HEADERS = frozenset({"content-length", "transfer-encoding"})
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(.*?)[ \t]*", re.DOTALL)
_URL = re.compile(r"https?://(?:[^/?#@]*@)?([^/?#]*)([^#]*)(?:#.*)?", re.DOTALL | re.IGNORECASE)


@click.group(
    epilog="""\b
Examples:
  scopegate routes list --config config/scopegate.yaml
  scopegate routes match --config config/scopegate.yaml POST /api/v1/recovery/execute
  scopegate routes suggest openapi.yaml --output gate"""
)
def routes() -> None:
    """Routes: list them, try a request against them, suggest some for a backend."""


# Listing ------------------------------------------------------------------------------------------------


@routes.command(
    "list",
    epilog="""\b
Examples:
  scopegate routes list --config config/scopegate.yaml
  scopegate routes list --config config/scopegate.yaml --json | jq -r '.routes[].name'""",
)
@config_option
@set_option
@json_option
def list_(config: Path, overrides: tuple[str, ...], *, as_json: bool) -> None:
    """Show the gated routes, where each reads its facts, and where it is configured."""
    from sidecar.cli.tables import table

    loaded = _loaded(config, overrides)
    rows = [_row(loaded, index) for index in range(len(loaded.settings.gate.routes))]
    if as_json:
        tell({"routes": rows, "unlisted": _unlisted(loaded)})
        return
    table([line for row in rows for line in _table_rows(row)], "There is no route.")
    unlisted = _unlisted(loaded)
    excepted = f", except {', '.join(unlisted['except'])}" if unlisted["except"] else ""
    click.echo(f"\nnot listed: reads {unlisted['reads']}, writes {unlisted['writes']}{excepted}")


def _unlisted(loaded: Loaded) -> dict[str, Any]:
    """What becomes of requests that no route lists."""
    section = loaded.settings.gate.unlisted
    return {
        "reads": section.reads,
        "writes": section.writes,
        "except": [pattern.text for pattern in section.excepted],
    }


def _row(loaded: Loaded, index: int) -> dict[str, Any]:
    """One route, by the heads of the table."""
    route = loaded.settings.gate.routes[index]
    return {
        "name": route.label,
        "methods": list(route.methods),
        "path": list(route.path.texts),
        "body": list(route.body),
        "action": str(route.action),
        "target_agents": [str(place) for place in route.target_agents],
        "scope_id": str(route.scope_id),
        "incident_id": str(route.incident_id),
        "mode": route.mode,
        "source": _source(loaded, index),
    }


def _source(loaded: Loaded, index: int) -> str:
    """Where a route comes from: its place in the file, the flag or variable that gives all routes, a preset,
    or `default`."""
    from sidecar.settings.routes import routes_of_preset

    gate = loaded.settings.gate
    for name in gate.presets:
        if any(one is gate.routes[index] for one in routes_of_preset(name)):
            return f"preset {name}"
    place = next(iter(loaded.places["gate.routes"]), "default")
    in_file = loaded.document.place(("gate", "routes"))
    return loaded.document.place(("gate", "routes", index)) if place == in_file else place


def _table_rows(row: dict[str, Any]) -> Iterator[dict[str, str]]:
    """A route as a row of the table, and a row for each further path."""
    first, *others = row["path"]
    cells = {name: ", ".join(value) if isinstance(value, list) else value for name, value in row.items()}
    yield {**cells, "path": first}
    yield from ({**dict.fromkeys(cells, ""), "path": path} for path in others)


def _loaded(config: Path, overrides: tuple[str, ...]) -> Loaded:
    """The configuration. Ends the program with a message about every mistake in it."""
    from sidecar.files.faults import ConfigurationError
    from sidecar.settings import reading as settings

    try:
        loaded = settings.load(config, environment=os.environ, overrides=pairs(overrides), read_keys=False)
    except ConfigurationError as exc:
        misconfigured(str(exc))
    warn(loaded.warnings)
    return loaded


# Trying a request ---------------------------------------------------------------------------------------


@routes.command(
    epilog="""\b
Examples:
  scopegate routes match --config config/scopegate.yaml POST /api/v1/recovery/execute
  scopegate routes match --config config/scopegate.yaml POST http://127.0.0.1:8000/api/v1/recovery/execute \\
    -H 'Content-Type: application/json' --body body.json"""
)
@config_option
@set_option
@click.option(
    "-H",
    "--header",
    "headers",
    multiple=True,
    metavar="'NAME: VALUE'",
    help="A header of the request; repeatable.",
)
@click.option(
    "--body",
    type=click.File("rb"),
    metavar="FILE",
    help="The body of the request; - for standard input.",
)
@json_option
@click.argument("method")
@click.argument("url")
def match(
    config: Path,
    overrides: tuple[str, ...],
    headers: tuple[str, ...],
    body: Any,
    method: str,
    url: str,
    *,
    as_json: bool,
) -> None:
    """Show which route takes a request, why the others do not, and the facts that are read from it.

    URL is a URL or a path, and is judged as it is written. No sidecar need run: nothing is sent, and neither
    the store nor the policies are asked. Exit code 0: gated, even if it would be refused; 1: it passes
    through; 2: wrong usage.
    """
    raw = _request(method, url, headers, None if body is None else body.read())
    loaded = _loaded(config, overrides)
    trial = _tried(raw, loaded)
    document = _document(trial, loaded)
    answered(document, as_json, _described(document))
    if not as_json:
        _show_others(document["others"])
    sys.exit(FAILED if document["outcome"] == "passes" else 0)


def _request(method: str, url: str, headers: tuple[str, ...], body: bytes | None) -> bytes:
    """The bytes of a request. Its target is the URL as it is written, without origin and fragment."""
    found = _URL.fullmatch(url)
    host, target = (found[1], found[2]) if found else ("localhost", url)
    if not target.startswith("/"):
        if not found:
            raise click.UsageError(
                "URL is a path, which begins with a slash, or begins with http:// or https://"
            )
        target = "/" + target
    for word, text in (("METHOD", method), ("URL", url)):
        if not text or not text.isprintable() or " " in text:
            raise click.UsageError(f"{word} has a blank or a control character; write a blank as %20")
    given = [_header(text) for text in headers]
    lines = [f"{method.upper()} {target} HTTP/1.1"]
    if "host" not in (name.lower() for name, _ in given):
        lines.append(f"Host: {host}")
    lines += [f"{name}: {value}" for name, value in given]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + (body or b"")


def _header(text: str) -> tuple[str, str]:
    found = _HEADER.fullmatch(text)
    if found is None or any(mark in text for mark in "\r\n\0"):
        raise click.BadParameter(f"{text!r} is not 'Name: value'", param_hint="-H")
    if found[1].lower() in _OWN_HEADERS:
        raise click.BadParameter(f"{found[1]} is made from --body; leave it out", param_hint="-H")
    return found[1], found[2]


def _tried(raw: bytes, loaded: Loaded) -> Trial:
    import asyncio

    from sidecar.live.snapshot import Snapshot
    from sidecar.web.data.trial import tried

    return asyncio.run(tried(raw, Snapshot(loaded.settings, None)))


def _document(trial: Trial, loaded: Loaded) -> dict[str, Any]:
    """The answer as JSON."""
    if trial.is_own_call:
        outcome = "served"
    elif trial.is_gated:
        outcome = "gated"
    else:
        outcome = "passes" if trial.refusal is None else "refused"
    claims, refusal, route = trial.claims, trial.refusal, trial.route
    return {
        "outcome": outcome,
        "route": None if route is None else _named(route, loaded),
        "shadow": trial.shadow,
        "error": None if refusal is None else refusal.code,
        "message": None if refusal is None else refusal.message,
        "facts": None
        if claims is None
        else {
            "scope_id": claims.scope_id,
            "incident_id": claims.incident_id,
            "action": claims.action,
            "target_agents": list(claims.target_agents),
            "parameters": json.loads(json.dumps(claims.parameters, default=float)),  # a Decimal is a float
        },
        "unlisted": None if trial.unlisted is None else _treatment(*trial.unlisted, loaded),
        "others": [{**_named(other, loaded), "why": why} for other, why in trial.others],
    }


def _treatment(treatment: Treatment, access: Access, loaded: Loaded) -> dict[str, str]:
    """What becomes of a request that no route lists, and the key that says so."""
    excepted = treatment == "pass" and getattr(loaded.settings.gate.unlisted, access) != "pass"
    return {"key": f"gate.unlisted.{'except' if excepted else access}", "treatment": treatment}


def _named(route: Route, loaded: Loaded) -> dict[str, str]:
    index = next(index for index, one in enumerate(loaded.settings.gate.routes) if one is route)
    return {"name": route.label, "source": _source(loaded, index)}


_TREATMENTS = {
    "pass": "no route takes it, and it leaves no record",
    "record": "no route takes it; it passes once a record is on disk",
}


def _described(document: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """The labelled lines of the answer."""
    route, facts = document["route"], document["facts"]
    unlisted = document["unlisted"]
    if document["outcome"] == "served":
        yield "served", "the sidecar answers this call itself"
    elif document["outcome"] == "passes":
        yield "passes", f"{_TREATMENTS[unlisted['treatment']]} ({unlisted['key']})"
    elif document["outcome"] == "refused":
        pass
    elif route is None:
        yield "gated", "by no route in particular, because the request cannot be judged"
    else:
        yield "gated", f"by {route['name']}, {route['source']}"
    if document["error"] is not None:
        label = "in shadow" if document["shadow"] else "refused"
        yield label, f"{document['error']}: {document['message']}"
    if facts is not None:
        yield "action", facts["action"] or "(none)"
        yield "incident", facts["incident_id"] or "(none)"
        yield "scope", facts["scope_id"] or "(none)"
        yield "targets", ", ".join(facts["target_agents"]) or "(none)"
        yield "parameters", json.dumps(facts["parameters"], ensure_ascii=False)


def _show_others(others: list[dict[str, str]]) -> None:
    from sidecar.cli.tables import table
    from sidecar.web.data.trial import ANOTHER_PATH

    # Many routes have another path, and the reasons of the rest would be lost among them.
    telling = [one for one in others if one["why"] != ANOTHER_PATH]
    rest = [one for one in others if one["why"] == ANOTHER_PATH]
    shown = telling + (rest if len(rest) <= _MAX_SHOWN else [])
    if others:
        click.echo()
    if shown:
        rows = [{"other route": one["name"], "source": one["source"], "why not": one["why"]} for one in shown]
        table(rows, "")
    if len(shown) < len(others):
        click.echo(f"{len(others) - len(shown)} other routes: {ANOTHER_PATH}")


# Suggesting routes --------------------------------------------------------------------------------------


@routes.command(
    epilog="""\b
Examples:
  scopegate routes suggest openapi.yaml
  scopegate routes suggest openapi.yaml --output gate"""
)
@click.argument("openapi", type=click.Path(path_type=Path, allow_dash=True))
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write scopegate.yaml and policies/actions.yaml into this folder; no file is overwritten.",
)
def suggest(openapi: Path, output: Path | None) -> None:
    """Suggest a route and an action for each operation of a backend that writes, from its OpenAPI 3 document.

    OPENAPI is a JSON or YAML file, or - for standard input. A table shows every operation and what becomes of
    it. Without --output the suggested files are printed as well. Their comments say what a person has to
    decide.
    """
    from sidecar.cli.operations import read
    from sidecar.cli.suggestion import suggested
    from sidecar.cli.tables import table
    from sidecar.files.faults import ConfigurationError

    try:
        suggestion = suggested(read(None if str(openapi) == "-" else openapi))
    except ConfigurationError as exc:
        misconfigured(str(exc))
    files = {"scopegate.yaml": suggestion.configuration(), "policies/actions.yaml": suggestion.catalogue()}
    if output is None:
        for name, text in files.items() if suggestion.routes else ():
            click.echo(f"# ---- {name}\n{text}")
    table(suggestion.rows(), f"{openapi} has no operation.")
    for note in suggestion.backend.notes:
        click.echo(f"{note}", err=True)
    if not suggestion.routes:
        failed(f"{openapi}: no operation gets a route, so there is no file to write")
    if output is not None:
        _write({output / name: text for name, text in files.items()})
        click.echo(f"wrote {' and '.join(str(output / name) for name in files)}")
        click.echo("a line with DECIDE in them names what is left to a person")


def _write(files: dict[Path, str]) -> None:
    """Write new files, with their folders. Ends the program if one exists or cannot be written."""
    for path in files:
        if path.exists() or path.is_symlink():
            misconfigured(f"{path}: exists already; name another folder with --output, or move the file away")
    for path, text in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as stream:
                stream.write(text)
        except OSError as exc:
            failed(f"cannot write {path} ({exc.strerror}); name a folder that can be written with --output")

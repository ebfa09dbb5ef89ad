"""`gate.presets`: which routes a configuration has by it, and the mistakes in it, each with its place."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.target import Gated, GatedPaths, PassThrough, classify
from sidecar.files.yamlfile import parse
from sidecar.settings.keys import differing, values_of
from sidecar.settings.presets import NAMES, preset
from sidecar.settings.reading import Settings
from sidecar.settings.routes import routes_of_preset
from tests.cases import load_cases
from tests.interfaces import Call
from tests.unit.test_settings import faults, settings_of

FOLDER = resources.files("sidecar.settings.presets")


def names_of(settings: Settings) -> list[str | None]:
    return [route.name for route in settings.gate.routes]


def test_the_presets_are_those_that_are_promised() -> None:
    assert set(NAMES) == {
        *("awx", "rundeck", "jenkins", "argo-workflows", "argo-cd", "kubernetes", "airflow", "stackstorm"),
        *("temporal", "pagerduty", "docker", "aws-ssm", "nomad"),
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_comment_of_a_preset_names_the_documentation_and_the_version(name: str) -> None:
    comment = (FOLDER / f"{name}.yaml").read_text("utf-8").partition("\n\n")[0]
    assert all(line.startswith("#") for line in comment.splitlines())
    words = " ".join(comment.replace("\n#", "").split())
    assert "Documentation: https://" in words
    assert re.search(r"Written for .*[0-9]", words)
    assert "target agent" in words.lower()
    assert "Not gated: " in words or "every call" in words


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_may_be_written_into_the_routes_of_a_file(tmp_path: Path, name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text("utf-8")
    indented = "".join(f"    {line}\n" if line else "\n" for line in text.splitlines())
    assert settings_of(tmp_path, f"gate:\n  routes:\n{indented}").gate.routes == routes_of_preset(name)


def test_the_routes_of_a_preset_come_after_the_configured_ones(tmp_path: Path) -> None:
    own = "gate:\n  presets: [awx, pagerduty]\n  routes:\n    - {name: mine, path: /mine}\n"
    awx, pagerduty = routes_of_preset("awx"), routes_of_preset("pagerduty")
    settings = settings_of(tmp_path, own)
    assert settings.gate.routes[0].name == "mine"
    assert settings.gate.routes[1:] == (*awx, *pagerduty)


def test_without_routes_their_default_stays_and_an_empty_list_leaves_the_presets_alone(
    tmp_path: Path,
) -> None:
    awx = routes_of_preset("awx")
    settings = settings_of(tmp_path, "gate: {presets: [awx]}")
    assert settings.gate.routes[0].path.text == "**/recovery/execute"
    assert settings.gate.routes[1:] == awx
    assert settings_of(tmp_path, "gate: {presets: [awx], routes: []}").gate.routes == awx


def test_a_configured_route_replaces_that_of_a_preset_with_its_name(tmp_path: Path) -> None:
    own = "{name: awx.launch, path: /x/api/v2/job_templates/42/launch/, mode: shadow, body: any}"
    settings = settings_of(tmp_path, f"gate: {{presets: [awx], routes: [{own}]}}")
    names = names_of(settings)
    assert sorted(map(str, names)) == sorted(str(route.name) for route in routes_of_preset("awx"))
    (replaced,) = [route for route in settings.gate.routes if route.name == "awx.launch"]
    assert replaced.mode == "shadow"
    assert replaced.path.text == "/x/api/v2/job_templates/42/launch/"


def test_presets_come_from_the_environment_and_flags_too(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "gate: {presets: [awx]}", SCOPEGATE_GATE__PRESETS="[pagerduty]")
    assert settings.gate.presets == ("pagerduty",)
    settings = settings_of(tmp_path, "gate: {routes: []}", ("gate.presets", "[nomad]"))
    assert settings.gate.routes == routes_of_preset("nomad")


def test_what_is_in_force_is_shown_with_the_routes_of_presets_and_may_be_written_back(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "gate: {presets: [pagerduty], routes: []}")
    values: dict[str, Any] = values_of(settings)
    assert values["gate.presets"] == ["pagerduty"]
    assert [route["name"] for route in values["gate.routes"]] == names_of(settings)
    again = Settings.model_validate(settings.model_dump(mode="json", by_alias=True))
    assert again.gate.routes == settings.gate.routes
    assert differing(settings, settings_of(tmp_path, "gate: {presets: [nomad], routes: []}")) == (
        "gate.presets",
        "gate.routes",
    )


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "gate:\n  presets: [awx, rundek]",
            f'3:18: gate.presets[1]: expects one of {", ".join(NAMES)}; did you mean "rundeck"?',
        ),
        ("gate:\n  presets: [awx, 5]", f"3:18: gate.presets[1]: expects one of {', '.join(NAMES)}"),
        ("gate:\n  presets: awx", "3:3: gate.presets: expects a list, found text"),
        ("gate:\n  presets: null", "3:3: gate.presets: expects a list, found nothing"),
        ("gate:\n  presets: [awx, nomad, awx]", "3:25: gate.presets[2]: is listed twice; remove it here"),
        (
            "gate:\n  presets: []\n  routes: []",
            "4:3: gate.routes: is empty; add a route here or a name to gate.presets, or remove the key",
        ),
        (
            "gate:\n  presets: [awx]\n  routes:",
            "4:3: gate.routes: is empty; write [] if the presets are all, or add a route",
        ),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, text: str, fault: str) -> None:
    assert faults(tmp_path, text) == [f"c.yaml:{fault}"]


def test_a_route_that_rivals_one_of_a_preset_is_told_so_at_both_places(tmp_path: Path) -> None:
    own = "{name: mine, path: '/automation_actions/actions/{action}/invocations'}"
    same = "for the same methods, too; keep one of them"
    assert faults(tmp_path, f"gate:\n  presets: [awx, pagerduty]\n  routes:\n    - {own}") == [
        f"c.yaml:3:18: gate.presets[1]: is the path of gate.routes[0] {same}",
        f"c.yaml:5:20: gate.routes[0].path: is the path of pagerduty.invoke (preset pagerduty) {same}, "
        "or take its name, pagerduty.invoke, to replace it",
    ]


def test_two_presets_with_the_same_call_are_told_so_once(tmp_path: Path) -> None:
    assert faults(tmp_path, "gate:\n  presets: [kubernetes, awx, nomad]") == [
        "c.yaml:3:30: gate.presets[2]: gates **/evaluate, which kubernetes gates, too; use one of the two"
    ]
    together = settings_of(tmp_path, "gate: {presets: [awx, jenkins, pagerduty], routes: []}")
    assert len(together.gate.routes) == sum(len(preset(name)) for name in together.gate.presets)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_strict_yaml(name: str) -> None:
    file = FOLDER / f"{name}.yaml"
    assert tuple(parse(file.read_bytes(), name).value) == preset(name)


# Spellings ----------------------------------------------------------------------------------------------

SPELLINGS: dict[str, Callable[[str], str]] = {
    "a parameter": lambda path: path + ";x=1",
    "an encoded parameter": lambda path: path + "%3Bx=1",
    "a slash at the end": lambda path: path + "/",
    "an encoded slash at the end": lambda path: path + "%2F",
    "a blank at the end": lambda path: path + "%20",
    "a NUL at the end": lambda path: path + "%00x",
    "a dot segment": lambda path: "/." + path,
    "dot segments": lambda path: "/x/.." + path,
    "encoded dot segments": lambda path: "/x/%2e%2e" + path,
    "a double slash": lambda path: "/" + path,
    "a double slash at the end": lambda path: "//".join(path.rsplit("/", 1)),
    "a backslash": lambda path: "/" + path[1:].replace("/", "\\", 1),
    "an encoded slash": lambda path: "%2F".join(path.rsplit("/", 1)),
    "capitals": str.upper,
    "an encoded letter": lambda path: f"/%{ord(path[1:2] or '/'):02x}{path[2:]}",
    "a soft hyphen": lambda path: path[:2] + "%C2%AD" + path[2:],
    "an absolute form": lambda path: "http://backend.example" + path,
}


@pytest.mark.parametrize("name", NAMES)
def test_no_lenient_spelling_of_a_gated_call_passes(name: str) -> None:
    gated = GatedPaths(route.calls for route in routes_of_preset(name))
    passed = []
    for call in map(Call.of, load_cases(f"presets/{name}")["gated"]):
        path = call.target.partition("?")[0]
        assert isinstance(classify(call.method, path, (), False, gated), Gated)
        for spelling, spelled in SPELLINGS.items():
            if isinstance(classify(call.method, spelled(path), (), False, gated), PassThrough):
                passed.append(f"{call.method} {path} with {spelling}")
    assert passed == []

"""The pages are held to the code: what exists stands in them, and what stands in them exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from sidecar import __version__
from sidecar.cli.demo import POLICIES
from sidecar.cli.main import main
from sidecar.core.policy import FACTS
from sidecar.policies import files as policyfiles
from sidecar.telemetry.metrics import Metrics
from sidecar.web.api.decisions import DECISIONS
from sidecar.web.api.emitters import RUNS_AND_SWITCH
from sidecar.web.api.executions import EXECUTIONS
from sidecar.web.api.explain import EXPLAIN
from sidecar.web.api.ops import OPS
from sidecar.web.api.scopelists import SCOPE_LISTS
from sidecar.web.api.state import STATE

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = ROOT / "config/reference"
WIRE = (REFERENCE / "wire.md").read_text(encoding="utf-8")
ADMIN_AND_OPS = (REFERENCE / "admin-and-ops.md").read_text(encoding="utf-8")
COMMANDS = (REFERENCE / "commands.md").read_text(encoding="utf-8")
LIBRARY = (REFERENCE / "library.md").read_text(encoding="utf-8")
POLICY_PAGE = (ROOT / "policies/README.md").read_text(encoding="utf-8")
# Every page of the repository, and no page of a package that is installed below it.
PAGES = {
    str(file.relative_to(ROOT)): file.read_text(encoding="utf-8")
    for file in (
        *ROOT.glob("*.md"),
        *(
            file
            for folder in ("config", "policies", "sidecar", "tests")
            for file in sorted((ROOT / folder).rglob("*.md"))
            if "node_modules" not in file.parts
        ),
    )
}


def section(page: str, title: str) -> str:
    """The text of a page below a heading, down to the next one of its level or above."""
    level, body = re.split(rf"^(#+) {re.escape(title)}$", page, maxsplit=1, flags=re.MULTILINE)[1:]
    return re.split(rf"^#{{1,{len(level)}}} ", body, maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of every table row, heads and rules left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "`" in line]


def plain(cell: str) -> str:
    return cell.strip("`")


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for word in command.list_commands(context):
            below = command.get_command(context, word)
            assert below is not None
            yield from commands(below, f"{name} {word}")


ALL_COMMANDS = dict(commands(main, "scopegate"))


def test_the_readme_is_one_page() -> None:
    assert len(README.splitlines()) < 220


def test_the_readme_names_every_preset() -> None:
    shipped = {file.stem for file in (ROOT / "sidecar/settings/presets").glob("*.yaml")}
    named = {plain(cell) for row in rows(section(README, "Will it fit my service?")) for cell in row[1::2]}
    assert {name for name in named if re.fullmatch("[a-z-]+", name)} == shipped


def test_every_fact_of_a_condition_stands_in_the_page_of_policies() -> None:
    assert [fact for fact in FACTS if f"`{fact}`" not in POLICY_PAGE] == []


def test_every_metric_stands_in_the_reference() -> None:
    shown = {plain(row[0]) for row in rows(section(ADMIN_AND_OPS, "Ops"))}
    families = Metrics().registry.collect()
    assert shown == {family.name + ("_total" if family.type == "counter" else "") for family in families}


def test_every_call_of_the_admin_and_ops_listeners_stands_in_the_reference() -> None:
    listed = (*DECISIONS, *SCOPE_LISTS, *EXECUTIONS, EXPLAIN, *RUNS_AND_SWITCH, *STATE, *OPS)
    calls = [f"`{each.method.upper()} {each.path}`" for each in listed]
    assert [each for each in (*calls, "`POST /api/v1/decisions/{kind}`") if each not in ADMIN_AND_OPS] == []


def test_every_filter_and_its_values_stand_in_the_reference() -> None:
    admin = section(ADMIN_AND_OPS, "Admin")
    lists = [each for each in (*DECISIONS, *EXECUTIONS) if each.query]
    filters = [parameter.name for each in lists for parameter in each.query]
    statuses = EXECUTIONS[0].query[0].schema["enum"]
    assert [name for name in (*filters, *statuses) if f"`{name}`" not in admin] == []


def test_every_command_and_option_stands_in_the_reference() -> None:
    cells = {plain(row[0]): row[1] for row in rows(COMMANDS)}
    shared = {name: cell for name, cell in cells.items() if name.startswith("*asking ")}
    assert len(shared) == 2
    for name, cell in cells.items():
        for kind, options in shared.items():
            cells[name] = cell.replace(kind, options) if kind in cell else cells[name]
    shown = {name: set(re.findall(r"`(--[a-z-]+)`", cell)) for name, cell in cells.items()}
    assert {name: options for name, options in shown.items() if name.startswith("scopegate")} == {
        name: {
            name
            for one in command.params
            if isinstance(one, click.Option)
            for name in one.opts
            if name.startswith("--")
        }
        for name, command in ALL_COMMANDS.items()
        if not isinstance(command, click.Group)
    }
    assert "`scopegate --version`" in COMMANDS


@pytest.mark.parametrize("name", ALL_COMMANDS)
def test_every_help_page_has_an_example(name: str) -> None:
    shown = CliRunner().invoke(main, [*name.split()[1:], "--help"])
    assert shown.exit_code == 0
    assert re.search(rf"Examples?:\n +{name}", shown.output), shown.output


def named_files(page: str) -> dict[str, str]:
    """The files that a page shows whole, by the name in their first line."""
    return {
        found[1]: found[0]
        for found in re.finditer(r"(?<=^```yaml\n)# ([\w./-]+\.yaml)\n.+?(?=^```$)", PAGES[page], re.M | re.S)
    }


def anchors(text: str) -> set[str]:
    """As a heading is turned into the name of its anchor: small letters, no marks, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", without_code(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", without_code(text))


def without_code(text: str) -> str:
    return re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)


def target_of(page: str, link: str) -> tuple[Path, str]:
    """The file that a link of a page leads to, and the anchor in it."""
    file, _, anchor = link.partition("#")
    return Path(os.path.normpath((ROOT / page).parent / file)) if file else ROOT / page, anchor


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_resolves(page: str) -> None:
    dead = []
    for link in links(PAGES[page]):
        if re.match(r"https?://", link):
            continue
        file, anchor = target_of(page, link)
        if not file.is_file() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            dead.append(link)
    assert dead == []


def test_every_page_is_reached_from_the_readme() -> None:
    reached, left = set[str](), ["README.md"]
    while left:
        page = left.pop()
        if page in PAGES and page not in reached:
            reached.add(page)
            files = [target_of(page, link)[0] for link in links(PAGES[page]) if "://" not in link]
            left += [str(file.relative_to(ROOT)) for file in files]
    assert PAGES.keys() - reached == set()


@pytest.mark.parametrize("name", ["scopes", "decisions"])
def test_the_examples_in_python_run_as_they_stand(name: str, tmp_path: Path) -> None:
    (example,) = re.findall(
        rf"^<!-- example: {name} -->\n```python\n(.+?)^```$", LIBRARY, re.MULTILINE | re.DOTALL
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert {"scopes": "'attempt_number': 1", "decisions": "None\nNone\n"}[name] in ran.stdout


@pytest.mark.parametrize("purpose", ["demo", "test"])
def test_the_two_commands_are_one_line_each(purpose: str) -> None:
    (line,) = re.findall(rf"^<!-- {purpose} command -->\n```sh\n(.+)\n```$", README, flags=re.MULTILINE)
    assert line.startswith("python3 -m venv .venv && .venv/bin/pip install -q -c requirements.lock ")


def test_the_changelog_knows_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(__version__)}$", changelog, flags=re.MULTILINE)


def test_the_lock_pins_every_requirement_and_names_no_place() -> None:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[a-z0-9-]+==[0-9][\w.]*( ; [\w\s.'<>=!]+)?", pin)] == []
    pinned = {pin.partition("==")[0] for pin in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["test"], *extras["lint"]]
    names = {re.split(r"[^A-Za-z0-9-]", one)[0].lower() for one in wanted}
    assert names - pinned == set()


def test_the_actions_of_the_demo_are_those_that_ship() -> None:
    shipped = policyfiles.load(ROOT / "policies")
    assert {name: shipped.action(name) for name in POLICIES.actions} == POLICIES.actions

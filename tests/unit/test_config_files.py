"""Which configuration file a command reads if none is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from sidecar.cli.main import main
from sidecar.settings import location
from tests.unit.test_docs import ALL_COMMANDS

CONFIG = "upstream: {url: http://127.0.0.1:9000}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder; what counts as /etc is in it as well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(location.VARIABLE, raising=False)
    monkeypatch.setattr(location, "FILES", (Path("scopegate.yaml"), tmp_path / "etc/scopegate.yaml"))
    (tmp_path / "etc").mkdir()
    return tmp_path


def wrote(file: Path, size: int) -> Path:
    file.write_text(f"{CONFIG}gate: {{max_in_flight: {size}}}\n")
    return file


def shown(*arguments: str) -> str:
    """`gate.max_in_flight`, which tells the files apart, with where it was given."""
    ended = CliRunner().invoke(main, ["config", "show", *arguments, "gate.max_in_flight"])
    assert ended.exit_code == 0, ended.output
    return ended.output


def test_the_flag_wins_over_the_variable_the_folder_and_etc(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrote(folder / "etc/scopegate.yaml", 1)
    assert " 1 " in shown()
    wrote(folder / "scopegate.yaml", 2)
    assert " 2 " in shown()
    monkeypatch.setenv(location.VARIABLE, str(wrote(folder / "third.yaml", 3)))
    output = shown()
    assert " 3 " in output
    assert location.VARIABLE not in output  # it is no unknown key of the environment
    assert " 4 " in shown("--config", str(wrote(folder / "fourth.yaml", 4)))


def test_without_any_file_the_error_names_all_places(folder: Path) -> None:
    for command in ("check", "status", "health"):
        ended = CliRunner().invoke(main, [command])
        assert ended.exit_code == 2
        for place in (
            "--config FILE",
            "SCOPEGATE_CONFIG",
            "./scopegate.yaml",
            "/etc/scopegate/scopegate.yaml",
        ):
            assert place in ended.output, (command, ended.output)


def test_a_file_that_the_variable_names_and_that_is_not_there_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrote(folder / "scopegate.yaml", 1)
    monkeypatch.setenv(location.VARIABLE, "gone.yaml")
    ended = CliRunner().invoke(main, ["check"])
    assert ended.exit_code == 2
    assert "gone.yaml: cannot be read" in ended.output


@pytest.mark.parametrize("target", ["gone.yaml", "scopegate.yaml"])
def test_a_link_that_leads_nowhere_does_not_lead_to_the_next_default_file(folder: Path, target: str) -> None:
    wrote(folder / "etc/scopegate.yaml", 1)
    (folder / "scopegate.yaml").symlink_to(target)
    ended = CliRunner().invoke(main, ["check"])
    assert ended.exit_code == 2
    assert "scopegate.yaml: cannot be read" in ended.output
    assert "etc/" not in ended.output


def test_a_command_that_names_a_listener_reads_no_default_file(folder: Path) -> None:
    (folder / "scopegate.yaml").write_text("broken: [\n")
    ended = CliRunner().invoke(main, ["status", "--admin", "127.0.0.1:1"])
    assert ended.exit_code == 3, ended.output
    assert CliRunner().invoke(main, ["status"]).exit_code == 2
    ended = CliRunner().invoke(main, ["scopes", "revoke", "scope_1", "--data", "127.0.0.1:1"])
    assert ended.exit_code == 2
    assert "--data names a sidecar, and its configuration is not known; give --config FILE, or --admin" in (
        " ".join(ended.output.split())
    )


def test_every_command_with_a_configuration_names_the_defaults() -> None:
    for command in ALL_COMMANDS.values():
        for option in command.params:
            if "--config" in option.opts:
                assert location.DEFAULT in (getattr(option, "help", None) or ""), command.name

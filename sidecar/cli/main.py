"""The main command and its options. Other modules do the work.

A command imports its modules when it runs, because a health check runs every few seconds and must not load
the others.
"""

from __future__ import annotations

import errno
import io
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from sidecar import __version__
from sidecar.cli.options import (
    FAILED,
    config_option,
    contents_of,
    failed,
    files_of,
    give_output_up,
    misconfigured,
    set_option,
)
from sidecar.startup import cheap_imports

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from sidecar.core.policy import PolicySet
    from sidecar.settings.reading import Settings

# The commands that are in their own modules, by command name: the module, which holds the command under its
# name, and the first sentence of the command's help, so that a list of the commands imports none of them.
ELSEWHERE = {
    "auth": ("auth", "Tokens of callers: make one, list them, revoke them."),
    "completion": (
        "completion",
        "Print the script that makes SHELL complete commands, options and their values.",
    ),
    "config": ("config", "Show the configuration in force and its sources; print its schema for editors."),
    "decisions": ("decisions", "Decision records: list them, show one, follow new ones."),
    "doctor": ("doctor", "Say what is exposed: by the files, at the backend, and by the running sidecar."),
    "executions": ("executions", "Executions: list them, and resolve those whose outcome is not known."),
    "explain": ("explain", "Ask a running sidecar whether it would admit an execution, and if not, why."),
    "freeze": ("freezes", "Stop executions."),
    "freezes": ("freezes", "List the freezes that are in force, newest first."),
    "health": ("status", "Check whether a sidecar is ready, and if not, why."),
    "log": ("log", "The decision log: verify it, sign it, export it."),
    "policy": ("policy", "Test policies, and decide recorded decisions again under another set."),
    "routes": ("routes", "Routes: list them, try a request against them, suggest some for a backend."),
    "scopes": ("scopes", "Execution scopes: create one, list and show them, revoke one or all."),
    "status": (
        "status",
        "Show whether a sidecar is ready, and if not, why; then its version, store, revisions and listeners.",
    ),
    "store": ("store", "The store: back it up, and accept the clock if the log disagrees with it."),
    "unfreeze": ("freezes", "Lift a freeze."),
}

log_format_option = click.option(
    "--log-format",
    type=click.Choice(["json", "text"]),
    default="json",
    show_default=True,
    help="The format of the log, which goes to standard error: JSON lines, or text for people.",
)


class Commands(click.Group):
    """Imports the module of a command on first use, and exits cleanly if the output cannot be written."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except OSError as exc:
            if not _is_of_output(exc):
                raise
            _unwritable(exc)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *ELSEWHERE})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in ELSEWHERE and cmd_name not in self.commands:
            module, _ = ELSEWHERE[cmd_name]
            self.add_command(getattr(import_module(f"sidecar.cli.{module}"), cmd_name))
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self._outline().format_commands(ctx, formatter)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        named = [
            CompletionItem(name, help=command.get_short_help_str())
            for name, command in sorted(self._outline().commands.items())
            if name.startswith(incomplete)
        ]
        return named + click.Command.shell_complete(self, ctx, incomplete)

    def _outline(self) -> click.Group:
        """The same commands by their names and short helps only."""
        outlines = {name: click.Command(name, help=help) for name, (_, help) in ELSEWHERE.items()}
        return click.Group(commands={**self.commands, **outlines})


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  scopegate demo --once                         see the gate at work, no set-up needed
  scopegate check --config config/scopegate.yaml
  scopegate config show --config config/scopegate.yaml gate
  scopegate run --config config/scopegate.yaml --log-format text
  scopegate status --config config/scopegate.yaml
  scopegate scopes list --config config/scopegate.yaml --status active
  scopegate decisions tail --config config/scopegate.yaml
  scopegate policy test policies
  scopegate log verify --config config/scopegate.yaml
  scopegate store backup /backup/scopegate.db --config config/scopegate.yaml""",
)
@click.version_option(__version__, prog_name="scopegate")
def main() -> None:
    """A sidecar that lets a recovery action through only if it consumes an execution scope."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an unencodable character must not end a command


@main.command(
    epilog="""\b
Example:
  scopegate run --config config/scopegate.yaml --set upstream.url=http://127.0.0.1:9000"""
)
@config_option
@set_option
@log_format_option
def run(config: Path, overrides: tuple[str, ...], log_format: Literal["json", "text"]) -> None:
    """Run the sidecar in front of the backend until SIGTERM."""
    with cheap_imports():
        import asyncio

        from sidecar.cli.process import run as serve_until_stopped
        from sidecar.errors import ScopegateError
        from sidecar.telemetry.logs import set_up_logging

    set_up_logging(log_format)
    files = files_of(config, overrides)
    contents = contents_of(files)
    loaded = contents.loaded.settings
    if loaded.store.file is None:
        misconfigured(f"{config}: store.url: run needs a store on disk; use sqlite:///file")
    _warn_of_open_door(loaded)
    try:
        asyncio.run(serve_until_stopped(contents, files))
    except ScopegateError as exc:
        failed(str(exc))


@main.command(
    epilog="""\b
Example:
  scopegate check --config config/scopegate.yaml"""
)
@config_option
@set_option
def check(config: Path, overrides: tuple[str, ...]) -> None:
    """Check the configuration and the policies as `run` reads them, and report every error.

    The policies are read once the configuration has no errors.
    """
    import time

    from sidecar.cli.findings import of_callers
    from sidecar.core.policy import RiskClass

    contents = contents_of(files_of(config, overrides))
    loaded, policies = contents.loaded.settings, contents.policies
    routes = ", ".join(
        route.label + (" (shadow: refuses nothing)" if route.mode == "shadow" else "")
        for route in loaded.gate.routes
    )
    unlisted = "refused" if policies.unlisted is None else f"{policies.unlisted.risk.value} risk"
    click.echo(f"configuration  {config}: ok")
    click.echo(f"policies       {loaded.policies}: ok, revision {policies.revision}")
    actions = _counted(len(policies.actions), "action")
    if policies.globs:
        actions += f" and {_counted(len(policies.globs), 'glob')} of actions"
    rules = _counted(len(policies.rules), "rule")
    click.echo(f"               {actions} listed; any other is {unlisted}")
    shadow = sum(rule.shadow for rule in policies.rules)
    click.echo(f"               {rules}, {shadow} of them in shadow mode")
    click.echo(f"gated          {routes}")
    unlisted_actions = _actions_without_entry(loaded, policies)
    if unlisted_actions:
        click.echo(f"               refused, because no policy lists them: {', '.join(unlisted_actions)}")
    if loaded.gate.scope_required_from > RiskClass.LOW:
        click.echo(f"               no scope is needed below {loaded.gate.scope_required_from.value} risk")
    click.echo(f"upstream       {loaded.upstream.url}")
    click.echo(f"store          {loaded.store.url}")
    if contents.callers.tokens is not None:
        tokens = _counted(len(contents.callers.tokens.tokens), "token")
        click.echo(f"tokens         {loaded.auth.tokens.file}: ok, {tokens}")
    if loaded.auth.principals is not None:
        known = _counted(len(contents.callers.principals.known), "glob")
        click.echo(f"principals     {loaded.auth.principals}: ok, {known}")
    _check_issuer_keys(loaded.auth.jwt.jwks)
    _warn_of_unspendable(loaded, policies)
    for finding in of_callers(contents, time.time_ns() // 1_000):
        # Without a method everything is as before, and the start says so in one line.
        if finding.code not in ("no_auth_method", "credential_not_required"):
            click.echo(f"warning: {finding.what}; {finding.remedy}", err=True)


@main.command(
    epilog="""\b
Examples:
  scopegate demo            serve until Ctrl-C, with commands to try
  scopegate demo --once     walk through steps A1 to A5 of the recovery API and exit"""
)
@click.option("--once", is_flag=True, help="Walk through steps A1 to A5, then exit; 0 only if all hold.")
def demo(once: bool) -> None:
    """Start an example backend with a sidecar in front of it, on free ports and with a temporary store."""
    import asyncio

    from sidecar.cli.demo import demonstrate
    from sidecar.errors import ScopegateError
    from sidecar.telemetry.logs import set_up_logging

    set_up_logging("text", "WARNING")
    try:
        held = asyncio.run(demonstrate(once=once))
    except ScopegateError as exc:
        failed(str(exc))
    sys.exit(0 if held else FAILED)


def _check_issuer_keys(jwks: str | None) -> None:
    """Read the keys of the issuer if they are in a file. Those of a URL are fetched by `run` alone."""
    if jwks is None:
        return
    if jwks.startswith("https://"):
        click.echo(f"issuer keys    {jwks}: fetched while the sidecar runs")
        return
    from sidecar.auth.jwks import read  # an optional extra
    from sidecar.files.faults import ConfigurationError

    try:
        found = read(Path(jwks))
    except ConfigurationError as exc:
        misconfigured(str(exc))
    click.echo(f"issuer keys    {jwks}: ok, {_counted(len(found.keys), 'key')}")
    for ignored in found.ignored:
        click.echo(f"warning: {ignored}, so it is ignored", err=True)


def _warn_of_unspendable(loaded: Settings, policies: PolicySet) -> None:
    """Warn of the actions for which no scope over HTTP can be granted, because they hold too much."""
    from sidecar.core.money import to_dollars

    most = loaded.scopes.limits.max_cost
    entries = {**policies.actions, **policies.globs}
    if policies.unlisted is not None:
        entries["*"] = policies.unlisted
    for name in sorted(name for name, entry in entries.items() if entry.hold > most):
        click.echo(
            f"warning: the action {name} holds {to_dollars(entries[name].hold):.12g} US dollars, and "
            f"scopes.limits.max_cost_usd is {to_dollars(most):.12g}, so every scope for it is refused; raise "
            "the limit, or lower max_cost_usd of the action",
            err=True,
        )


def _actions_without_entry(loaded: Settings, policies: PolicySet) -> list[str]:
    """The actions that routes name as `const:`, and that the catalogue does not have."""
    places = (route.sources.action for route in loaded.gate.routes)
    named = dict.fromkeys(place.name for place in places if place.kind == "const")
    return [name for name in named if policies.action(name) is None]


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


def _is_of_output(exc: OSError) -> bool:
    """Whether writing output failed. All output of commands goes through `echo`."""
    last = exc.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and last.tb_frame.f_code is click.echo.__code__


def _unwritable(exc: OSError) -> NoReturn:
    give_output_up()
    if exc.errno != errno.EPIPE:
        click.echo(
            f"scopegate: standard output cannot be written ({exc.strerror}); the command may have had its "
            "effect: check before you repeat it",
            err=True,
        )
    sys.exit(FAILED)


def _warn_of_open_door(loaded: Settings) -> None:
    if loaded.scopes.serve_on == "data" and not loaded.data.listen.is_loopback():
        from sidecar.telemetry.events import LogEvent

        LogEvent.OPEN_DOOR.log()

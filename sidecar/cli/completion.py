"""`scopegate completion`: prints the script that makes a shell complete commands, options and their
values."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command(
    epilog="""\b
Examples:
  scopegate completion bash
  scopegate completion zsh"""
)
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that makes SHELL complete commands, options and their values.

    To try it in bash: eval "$(scopegate completion bash)". To have it in every new shell, write it to the
    place where the shell looks for it:

    \b
    bash   ~/.local/share/bash-completion/completions/scopegate
    fish   ~/.config/fish/completions/scopegate.fish
    zsh    as _scopegate into a folder of $fpath, or into ~/.zshrc, behind compinit:
           eval "$(scopegate completion zsh)"
    """
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(ctx.find_root().command, {}, "scopegate", "_SCOPEGATE_COMPLETE").source())

"""What commands import, and what the garbage collector of a running sidecar walks."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest

from sidecar.cli.main import ELSEWHERE
from sidecar.cli.main import main as scopegate


def printed(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What a Python program prints, in a process of its own."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_list_of_commands_has_the_first_sentence_of_each(name: str) -> None:
    command = scopegate.get_command(click.Context(scopegate), name)
    assert command is not None
    assert command.get_short_help_str(1000) == click.Command(
        name, help=ELSEWHERE[name][1]
    ).get_short_help_str(1000)


# Slow to import; a command imports them only if its work needs them.
HEAVY = {
    *("aiohttp", "aiosqlite", "asyncio", "cryptography", "http.client", "jiter", "opentelemetry", "orjson"),
    *("prometheus_client", "pydantic", "sqlite3", "ssl", "yaml"),
}


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        ("--help", set()),
        ("--version", set()),
        ("run --help", set()),
        ("check --help", set()),
        ("completion bash", set()),
        ("routes match --help", set()),
        ("health --help", {"http.client", "ssl"}),
        ("decisions list --help", {"http.client", "ssl", "orjson"}),
    ],
)
def test_a_command_imports_nothing_heavy_that_it_does_not_need(words: str, needed: set[str]) -> None:
    code = (
        "import sys; from sidecar.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: print(*sys.modules, file=sys.stderr)"
    )
    done = printed(code, *words.split())
    assert done.stdout
    assert HEAVY & set(done.stderr.split()) == needed


def test_the_imports_of_run_leave_the_environment_and_the_collector_as_they_were() -> None:
    code = (
        "import gc, os; from sidecar.startup import cheap_imports\n"
        "os.environ['SSL_CERT_DIR'] = 'mine'; os.environ.pop('SSL_CERT_FILE', None)\n"
        "with cheap_imports(): import sidecar.serve; print(gc.isenabled())\n"
        "from aiohttp.connector import _SSL_CONTEXT_VERIFIED as unused\n"
        "print(gc.isenabled(), os.environ['SSL_CERT_DIR'], 'SSL_CERT_FILE' in os.environ)\n"
        "print(unused.cert_store_stats()['x509'])"
    )
    assert printed(code).stdout.split() == ["False", "True", "mine", "False", "0"]


def test_the_garbage_collector_walks_only_what_came_after_the_start() -> None:
    code = (
        "import gc; from sidecar.cli.process import YOUNG_VALUES, spare_the_collector\n"
        "kept = [[] for _ in range(100_000)]; spare_the_collector()\n"
        "print(len(gc.get_objects()) < 1000, gc.get_threshold()[0] == YOUNG_VALUES)"
    )
    assert printed(code).stdout.split() == ["True", "True"]


def test_run_imports_nothing_that_the_default_configuration_does_not_use() -> None:
    unused = (
        *("cel_expr_python", "cryptography", "jwt", "opentelemetry", "tabulate"),
        *("sidecar.web.api.docpage", "sidecar.web.api.openapi.document", "sidecar.library"),
    )
    modules = printed("import sys, sidecar.cli.process; print(*sys.modules)").stdout.split()
    assert "sidecar.serve" in modules
    assert [name for name in unused if name in modules] == []

"""Commands present a token: from `--token-file`, or from SCOPEGATE_TOKEN_FILE or SCOPEGATE_TOKEN."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sidecar.settings.variables import TOKEN, TOKEN_FILE
from tests.acceptance.conftest import Program, scopegate, write_configuration

SECRET = "sg_0123456789abcdefABCDEF"
# Every command that calls the admin listener.
ASKING = {
    "status": ("status",),
    "scopes list": ("scopes", "list"),
    "scopes show": ("scopes", "show", "scope_1"),
    "scopes revoke": ("scopes", "revoke", "scope_1"),
    "scopes revoke --all": ("scopes", "revoke", "--all", "--yes"),
    "scopes create": ("scopes", "create", "--incident-id", "i", "--action", "a", "--intent", "x"),
    "decisions list": ("decisions", "list"),
    "decisions show": ("decisions", "show", "d"),
    "decisions tail": ("decisions", "tail"),
    "executions list": ("executions", "list"),
    "executions reconcile": (*("executions", "reconcile", "d"), *("--outcome", "executed", "--reason", "x")),
    "explain": ("explain", "--action", "a"),
    "store accept-clock": ("store", "accept-clock"),
}


@dataclass
class Listener:
    """Gives each request the same answer, and keeps the heads of the requests."""

    address: str
    heads: list[str] = field(default_factory=list)

    @property
    def sent(self) -> list[str]:
        """The `Authorization` of each request; empty if it had none."""
        return [
            "".join(
                line.partition(":")[2].strip()
                for line in head.splitlines()
                if line.lower().startswith("authorization:")
            )
            for head in self.heads
        ]


@contextmanager
def listening(answer: bytes) -> Iterator[Listener]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        found = Listener(f"127.0.0.1:{server.getsockname()[1]}")
        over = threading.Event()

        def serve() -> None:
            while not over.is_set():
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                with connection:
                    connection.settimeout(5)
                    received = b""
                    while b"\r\n\r\n" not in received:
                        received += connection.recv(65_536)
                    found.heads.append(received.partition(b"\r\n\r\n")[0].decode())
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield found
        finally:
            over.set()
            thread.join()


def http(status: str, document: object, *headers: str) -> bytes:
    body = json.dumps(document).encode()
    lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "Connection: close", "", ""]
    return "\r\n".join(lines).encode() + body


UNAUTHENTICATED = http(
    "401 Unauthorized",
    {"error": "unauthenticated", "message": "A credential is required.", "methods": ["tokens"]},
)
ROLE_REQUIRED = http(
    "403 Forbidden",
    {"error": "role_required", "message": "The role is missing.", "role": "issuer", "principal": "agent-7"},
)
EMPTY = http("200 OK", {"scopes": [], "next": None})


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    return written(tmp_path / "token", SECRET + "\n")


def written(file: Path, text: str, mode: int = 0o600) -> Path:
    file.write_bytes(text.encode())
    file.chmod(mode)
    return file


@pytest.mark.parametrize("command", ASKING)
def test_every_command_that_calls_the_admin_listener_sends_the_token(command: str, token_file: Path) -> None:
    with listening(UNAUTHENTICATED) as admin:
        ended = scopegate(*ASKING[command], "--admin", admin.address, "--token-file", token_file)
    assert (ended.returncode, ended.stdout) == (1, ""), ended
    assert set(admin.sent) == {f"Bearer {SECRET}"}
    assert "scopegate: unauthenticated: A credential is required." in ended.stderr
    assert (
        f"the token of {token_file} is not valid here, or no longer; pass a valid token with" in ended.stderr
    )
    assert SECRET not in ended.stderr


def test_the_flag_comes_before_the_file_of_the_environment_and_that_before_its_token(
    token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening(EMPTY) as admin:
        asked = ("scopes", "list", "--admin", admin.address)
        scopegate(*asked)
        monkeypatch.setenv(TOKEN, "from-the-variable")
        scopegate(*asked)
        monkeypatch.setenv(TOKEN_FILE, str(written(tmp_path / "other", "from-the-file")))
        scopegate(*asked)
        scopegate(*asked, "--token-file", token_file)
        monkeypatch.setenv(TOKEN_FILE, "")  # as if it were not set
        monkeypatch.setenv(TOKEN, "")
        assert scopegate(*asked).returncode == 0
    assert admin.sent == [
        "",
        "Bearer from-the-variable",
        "Bearer from-the-file",
        f"Bearer {SECRET}",
        "",
    ]


@pytest.mark.parametrize(
    ("text", "mode", "why"),
    [
        (SECRET, 0o644, "may be read or written by others than its owner (mode 0644); chmod 600 it"),
        ("", 0o600, "holds no token; write the token into it, as one line"),
        ("\n", 0o600, "holds no token"),
        (f"{SECRET}\n{SECRET}\n", 0o600, "has several lines; write the token alone into it, as one line"),
        (f"{SECRET}\n\n", 0o600, "has several lines"),
        (f"{SECRET} x", 0o600, "has a character that no header may hold"),
        (f"{SECRET}\u00e9", 0o600, "has a character that no header may hold"),
        (f"{SECRET}\x00", 0o600, "has a character that no header may hold"),
        ("x" * 8_001, 0o600, "the token has 8,001 characters, more than 8,000"),
        (None, 0o600, "cannot be read (No such file or directory)"),
    ],
)
def test_a_token_file_that_cannot_be_used_says_why_and_sends_nothing(
    text: str | None, mode: int, why: str, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    if text is not None:
        written(file, text, mode)
    with listening(EMPTY) as admin:
        ended = scopegate("scopes", "list", "--admin", admin.address, "--token-file", file)
    assert (ended.returncode, ended.stdout, admin.heads) == (2, "", [])
    assert ended.stderr.startswith(f"{file}: ")
    assert why in ended.stderr
    assert SECRET not in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_token_of_the_environment_that_no_header_may_hold_sends_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(TOKEN, f"{SECRET}\r\nX-Other: 1")
    with listening(EMPTY) as admin:
        ended = scopegate("scopes", "list", "--admin", admin.address)
    assert (ended.returncode, ended.stdout, admin.heads) == (2, "", [])
    assert ended.stderr.startswith(f"{TOKEN}: the token has a character that no header may hold")
    assert SECRET not in ended.stderr


def test_an_answer_without_a_credential_says_how_to_pass_one() -> None:
    with listening(UNAUTHENTICATED) as admin:
        ended = scopegate("status", "--admin", admin.address)
    assert (ended.returncode, admin.sent) == (1, [""])
    said = (
        "next       pass a valid token with --token-file FILE, SCOPEGATE_TOKEN_FILE or SCOPEGATE_TOKEN, or a"
    )
    assert f"{said} client certificate with --cert and --key\n" in ended.stderr


@pytest.mark.parametrize("command", ["scopes create", "explain"])
def test_a_role_that_is_missing_is_named_with_what_to_do(command: str, token_file: Path) -> None:
    with listening(ROLE_REQUIRED) as admin:
        without = scopegate(*ASKING[command], "--admin", admin.address)
        ended = scopegate(*ASKING[command], "--admin", admin.address, "--token-file", token_file)
    assert (ended.returncode, without.returncode) == (1, 1)
    assert (
        "next       the caller lacks the role issuer; an operator gives it in `roles:` of" in without.stderr
    )
    assert f"the owner of the token of {token_file} lacks the role issuer; an operator" in ended.stderr
    assert "or pass a valid token with --token-file FILE" in ended.stderr


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    with Program(write_configuration(tmp_path_factory.mktemp("tokens"), ("127.0.0.1", 1))) as running:
        yield running


def test_scopes_on_the_data_listener_are_asked_for_with_the_token(sidecar: Program, token_file: Path) -> None:
    refused = http("403 Forbidden", {"error": "policy_denied", "message": "No."})
    with listening(refused) as data:
        at = ("--admin", "{}:{}".format(*sidecar.admin), "--data", data.address)
        ended = scopegate(*ASKING["scopes create"], *at, "--token-file", token_file)
    assert data.sent == [f"Bearer {SECRET}"]
    assert "policy_denied" in ended.stderr


def test_a_redirect_is_not_followed_so_the_token_stays_where_it_was_sent(token_file: Path) -> None:
    with listening(EMPTY) as other:
        redirect = http("307 Temporary Redirect", {}, f"Location: http://{other.address}/api/v1/scopes")
        with listening(redirect) as admin:
            ended = scopegate("scopes", "list", "--admin", admin.address, "--token-file", token_file)
    assert (ended.returncode, ended.stdout) == (3, "")
    assert (admin.sent, other.heads) == ([f"Bearer {SECRET}"], [])


def test_a_token_goes_to_no_other_host_without_tls(sidecar: Program, token_file: Path) -> None:
    at = ("--admin", "{}:{}".format(*sidecar.admin), "--data", "192.0.2.1:8000")
    ended = scopegate(*ASKING["scopes create"], *at, "--token-file", token_file)
    assert (ended.returncode, ended.stdout) == (2, ""), ended
    assert "192.0.2.1:8000 is another host without TLS" in ended.stderr
    assert "write --data https://HOST:PORT" in ended.stderr
    ended = scopegate("status", "--admin", "192.0.2.1:9901")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "another host is called only with TLS; write https://HOST:PORT" in ended.stderr


def test_a_health_check_sends_no_token_and_does_not_fail_for_one(tmp_path: Path) -> None:
    with listening(http("200 OK", {"ready": True, "checks": {}})) as ops:
        ended = scopegate("health", "--ops", ops.address, "--token-file", tmp_path / "none")
    assert (ended.returncode, ended.stdout) == (0, "ready\n")
    assert ops.sent == [""]


def test_the_configuration_knows_the_variables_of_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "scopegate.yaml"
    config.write_text("upstream: {url: 'http://127.0.0.1:1'}\n")
    monkeypatch.setenv(TOKEN, SECRET)
    monkeypatch.setenv(TOKEN_FILE, "/run/token")
    ended = scopegate("config", "show", "--config", config)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert SECRET not in ended.stdout

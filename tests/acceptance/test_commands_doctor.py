"""`scopegate doctor` before real backends and sidecars: what it names, and that a good one has no finding."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidecar.cli import doctor
from sidecar.cli.client import Trust
from sidecar.cli.options import files_of
from sidecar.settings.addresses import Listen
from tests.acceptance.conftest import EXECUTE, Address, Program, scopegate, write_configuration
from tests.certificates import Authority

KEY = "Bearer s3cr3t-of-the-backend"
ROLES = {role: {"groups": ["all"]} for role in ("issuer", "executor", "observer", "operator", "recorder")}
RULE = {"id": "r", "on": "issue", "limit": {"max_attempts": 5}}


class Demanding(ThreadingHTTPServer):
    """A backend that answers those who show its credential, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self, key: str | None, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.ahead = timedelta()  # of its clock
        self.key, self.seen = key, list[str]()
        self.status = 405  # of an answer to those who show it
        self.address: Address = ("127.0.0.1", self.server_port)
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Demanding:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that shows no certificate."""


class _Answer(BaseHTTPRequestHandler):
    server: Demanding

    def do_HEAD(self) -> None:
        self.server.seen.append(f"{self.command} {self.path}")
        allowed = self.server.key in (None, self.headers.get("Authorization"))
        self.send_response(self.server.status if allowed else 401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_OPTIONS = do_GET = do_HEAD  # noqa: N815 (the names that the base class calls)

    def send_header(self, keyword: str, value: str) -> None:
        """In lower case, as some servers write all headers."""
        super().send_header(keyword.lower(), value)

    def date_time_string(self, timestamp: float | None = None) -> str:
        return format_datetime(datetime.now(UTC) + self.server.ahead, usegmt=True)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing on standard error."""


@pytest.fixture
def backend() -> Iterator[Demanding]:
    with Demanding(KEY) as running:
        yield running


def good(folder: Path, backend: Address, **changes: Any) -> Path:
    """A configuration without findings: authentication, roles, custody, and everything listed or refused."""
    (folder / "backend-token").write_text(KEY)
    (folder / "backend-token").chmod(0o600)
    pair = Authority(folder).issue("admin", days=400)
    pair.key_file.chmod(0o600)
    sections: dict[str, Any] = {
        "auth": {"required": True, "tokens": {"file": "tokens.yaml"}},
        "upstream": {"credentials": [{"header": "Authorization", "value_file": "backend-token"}]},
        "gate": {"unlisted": {"writes": "refuse"}},
        "admin": {"tls": pair.settings()},
    }
    config = write_configuration(folder, backend, **{**sections, **changes})
    (folder / "policies" / "roles.yaml").write_text(yaml.safe_dump({"roles": ROLES, "rules": [RULE]}))
    made = scopegate(
        "auth", "token", "seer", "--group", "all", "--output", folder / "token", "--config", config
    )
    assert made.returncode == 0 or "auth" in changes, made.stderr
    return config


def examined(config: Path, *arguments: str | Path) -> tuple[int, dict[str, Any]]:
    ended = scopegate("doctor", "--config", config, "--json", *arguments)
    assert ended.returncode in (0, 1), ended.stderr
    return ended.returncode, json.loads(ended.stdout)


def codes(found: dict[str, Any]) -> list[str]:
    return [each["code"] for each in found["findings"]]


def test_a_good_configuration_has_no_finding_and_nothing_was_executed(
    tmp_path: Path, backend: Demanding
) -> None:
    config = good(tmp_path, backend.address)
    ports = free_ports(config)
    with Program(ports) as program:
        code, found = examined(ports, "--token-file", tmp_path / "token")
        said = scopegate("doctor", "--config", ports, "--token-file", tmp_path / "token")
        assert program.pid
    assert (code, found["exposed"], codes(found), found["not_tried"]) == (0, False, [], [])
    assert {each["code"] for each in found["notes"]} <= {"sqlite_wal_bug"}
    assert any(each.startswith("the gate: POST") for each in found["looked_at"])
    assert {each.split()[0] for each in backend.seen} == {"HEAD"}
    assert (said.returncode, "Nothing is exposed" in said.stdout) == (0, True)


def free_ports(config: Path) -> Path:
    """The configuration with free ports in the place of 0, so that commands find its listeners."""
    from tests.support import unused_port

    document = yaml.safe_load(config.read_text())
    for name in ("data", "admin", "ops"):
        document[name]["listen"] = f"127.0.0.1:{unused_port()}"
    config.write_text(yaml.safe_dump(document))
    return config


def shadow(folder: Path, backend: Address) -> Path:
    return good(
        folder, backend, gate={"routes": [{"path": "/a", "mode": "shadow"}], "unlisted": {"writes": "refuse"}}
    )


def open_writes(folder: Path, backend: Address) -> Path:
    return good(folder, backend, gate={"unlisted": {"writes": "pass"}})


def no_method(folder: Path, backend: Address) -> Path:
    return good(folder, backend, auth={})


def readable_key(folder: Path, backend: Address) -> Path:
    config = good(folder, backend)
    (folder / "backend-token").chmod(0o644)
    return config


def expiring(folder: Path, backend: Address) -> Path:
    config = good(folder, backend)
    scopegate("auth", "token", "soon", "--expires", "20d", "--config", config)
    return config


def expiring_certificate(folder: Path, backend: Address) -> Path:
    pair = Authority(folder, "short").issue("short", days=20)
    pair.key_file.chmod(0o600)
    return good(folder, backend, admin={"tls": pair.settings()})


def no_roles(folder: Path, backend: Address) -> Path:
    config = good(folder, backend)
    (folder / "policies" / "roles.yaml").write_text(yaml.safe_dump({"rules": [RULE]}))
    return config


def no_executor(folder: Path, backend: Address) -> Path:
    config = good(folder, backend)
    roles = {role: holders for role, holders in ROLES.items() if role != "executor"}
    (folder / "policies" / "roles.yaml").write_text(yaml.safe_dump({"rules": [RULE], "roles": roles}))
    return config


def wide_proxy(folder: Path, backend: Address) -> Path:
    proxy = {"header": "X-User", "trusted": ["0.0.0.0/0"], "id_prefix": "p:"}
    return good(folder, backend, auth={"required": True, "tokens": {"file": "tokens.yaml"}, "proxy": proxy})


def plain_tokens(folder: Path, backend: Address) -> Path:
    return good(folder, backend, data={"listen": "0.0.0.0:8000"})


def lent(folder: Path, backend: Address) -> Path:
    entry = {"header": "Authorization", "value_file": "backend-token", "on": ["gated", "pass"]}
    return good(folder, backend, upstream={"credentials": [entry]})


def two_methods(folder: Path, backend: Address) -> Path:
    proxy = {"header": "X-User", "trusted": ["10.0.0.0/8"]}
    return good(folder, backend, auth={"required": True, "tokens": {"file": "tokens.yaml"}, "proxy": proxy})


def scopeless(folder: Path, backend: Address) -> Path:
    return good(folder, backend, gate={"scope_required_from": "high", "unlisted": {"writes": "refuse"}})


SEEDED: dict[str, tuple[Callable[[Path, Address], Path], int]] = {
    "shadow_route": (shadow, 1),
    "unlisted_writes_pass": (open_writes, 1),
    "no_auth_method": (no_method, 1),
    "file_readable_by_others": (readable_key, 1),
    "wide_trusted_proxy": (wide_proxy, 1),
    "scopeless_actions": (scopeless, 1),
    "token_expires": (expiring, 0),
    "certificate_expires": (expiring_certificate, 0),
    "no_roles": (no_roles, 0),
    "role_without_holder": (no_executor, 0),
    "ids_without_prefix": (two_methods, 0),
    "credential_lent": (lent, 0),
    "tokens_without_tls": (plain_tokens, 0),
}


@pytest.mark.parametrize("code", SEEDED)
def test_a_seeded_misconfiguration_is_named_with_its_remedy(
    tmp_path: Path, backend: Demanding, code: str
) -> None:
    seed, exit_code = SEEDED[code]
    config = seed(tmp_path, backend.address)
    ended, found = examined(config, "--offline")
    also = {"no_auth_method": ["roles_without_method"]}.get(code, [])
    assert codes(found) == [code, *also]
    assert (ended, found["exposed"]) == (exit_code, bool(exit_code))
    assert all(each["remedy"] for each in found["findings"])
    said = scopegate("doctor", "--config", config, "--offline").stdout
    assert f"  {code}: {found['findings'][0]['finding']}." in said
    assert f"    Remedy: {found['findings'][0]['remedy']}." in said


def test_a_backend_that_answers_without_the_gate_is_exposed(tmp_path: Path) -> None:
    with Demanding(None) as backend:
        ended, found = examined(good(tmp_path, backend.address))
        assert {each.split()[0] for each in backend.seen} == {"HEAD"}
    assert (ended, codes(found)) == (1, ["backend_answers_ungated"])
    assert "405, as it does with the credential (405)" in found["findings"][0]["finding"]


def test_a_backend_that_has_no_such_path_says_nothing_and_that_is_said(tmp_path: Path) -> None:
    with Demanding(None) as backend:
        backend.status = 404
        ended, found = examined(good(tmp_path, backend.address))
    assert (ended, codes(found)) == (0, [])
    assert f"The backend answers HEAD {EXECUTE} with 404, which does not say" in found["not_tried"][0]


def test_a_backend_that_rejects_the_credential_is_a_warning(tmp_path: Path) -> None:
    with Demanding("Bearer another") as backend:
        ended, found = examined(good(tmp_path, backend.address))
    assert (ended, codes(found)) == (0, ["backend_rejects_credential"])


@pytest.mark.parametrize("minutes", [-1, 1])
def test_a_backend_whose_clock_differs_is_named(tmp_path: Path, backend: Demanding, minutes: int) -> None:
    backend.ahead = timedelta(minutes=minutes)
    ended, found = examined(good(tmp_path, backend.address))
    assert (ended, codes(found)) == (0, ["clock_skew"])


@pytest.mark.parametrize("asks_clients", [True, False])
def test_a_backend_is_asked_without_the_client_certificate_in_custody_and_with_it(
    tmp_path: Path, asks_clients: bool
) -> None:
    authority = Authority(tmp_path, "backend")
    tls = authority.server(authority.issue("server", address="127.0.0.9"), asks_clients=asks_clients)
    own = authority.issue("own", days=90)
    own.key_file.chmod(0o600)
    with Demanding(None, tls) as backend:
        config = good(
            tmp_path,
            backend.address,
            upstream={
                "url": f"https://127.0.0.1:{backend.server_port}",
                "tls": {**own.settings(ca_file=authority.certificate_file), "server_name": "gate.test"},
            },
        )
        ended, found = examined(config)
        seen = len(backend.seen)
    # The certificate of the authority ends in a day.
    findings = [code for code in codes(found) if code != "certificate_expires"]
    assert findings == ([] if asks_clients else ["backend_answers_ungated"])
    assert (ended, seen) == ((0, 2) if asks_clients else (1, 2))
    assert any(each.startswith("the backend: HEAD") for each in found["looked_at"])


def test_no_execution_goes_to_what_stands_at_the_address_of_the_data_listener(tmp_path: Path) -> None:
    """The status is that of a sidecar whose address leads from here to the backend."""
    with Demanding(None) as backend:
        config = good(tmp_path, ("127.0.0.1", 1), data={"listen": f"127.0.0.1:{backend.server_port}"})
        settings = files_of(config, ()).read().loaded.settings
        patient = doctor.Patient(settings, None, Trust())
        for named, why in (
            ("127.0.0.1:8000", "the sidecar says that its data listener is 127.0.0.1:8000"),
            (f"127.0.0.1:{backend.server_port}", "does not answer as the data listener of a sidecar"),
        ):
            examination = doctor.Examination()
            status = {"listeners": {"data": named}}
            assert list(doctor._through_the_gate(patient, status, examination)) == []
            assert why in examination.not_tried[0]
        assert {each.split()[0] for each in backend.seen} == {"OPTIONS"}


def test_what_cannot_be_tried_is_said_and_is_not_taken_for_good(tmp_path: Path, backend: Demanding) -> None:
    config = free_ports(good(tmp_path, backend.address))
    ended, found = examined(config)
    assert (ended, codes(found)) == (0, [])
    assert found["not_tried"][0].startswith("The running sidecar was not asked: no sidecar answers on")
    with Program(config):
        _, found = examined(config)  # without a token
    assert "The running sidecar does not answer (unauthenticated" in found["not_tried"][0]
    assert "--token-file" in found["not_tried"][0]


def test_a_sidecar_that_runs_with_other_settings_is_named(tmp_path: Path, backend: Demanding) -> None:
    config = free_ports(good(tmp_path, backend.address))
    with Program(config):
        _, found = examined(config, "--token-file", tmp_path / "token", "--set", "gate.max_in_flight=7")
    assert codes(found) == ["stale_configuration"]
    assert found["not_tried"] == ["The gate was not asked, because it has other settings or policies."]


def test_an_admin_interface_beyond_loopback_without_tls_is_exposed(tmp_path: Path) -> None:
    """127.0.0.1 stands for the address that other hosts reach."""
    with Program(write_configuration(tmp_path, ("127.0.0.1", 1))) as program:
        (found,) = doctor.admin_on(Listen(*program.admin))
        assert (found.code, found.level) == ("admin_reachable", "exposed")
        assert list(doctor.admin_on(Listen("127.0.0.1", 1))) == []


def test_a_configuration_that_cannot_be_read_is_told_from_an_exposed_one(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("upstream: {}\n")
    ended = scopegate("doctor", "--config", config)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "upstream.url: is required" in ended.stderr


def test_check_warns_of_what_concerns_callers(tmp_path: Path, backend: Demanding) -> None:
    for number, code in enumerate(("no_roles", "role_without_holder", "wide_trusted_proxy", "token_expires")):
        folder = tmp_path / str(number)
        folder.mkdir()
        ended = scopegate("check", "--config", SEEDED[code][0](folder, backend.address))
        assert ended.returncode == 0, ended.stderr
        _, found = examined(folder / "scopegate.yaml", "--offline")
        (finding,) = (each for each in found["findings"] if each["code"] == code)
        assert f"warning: {finding['finding']}; {finding['remedy']}\n" in ended.stderr
    plain = scopegate("check", "--config", write_configuration(tmp_path, ("127.0.0.1", 1)))
    assert plain.stderr == ""

"""Alerts and dashboard against the real /metrics, in a real Prometheus, after all that a minute can bring.

Windows and waits of the alerts are made sixty times shorter for it. Grafana is not to be had here: the
dashboard is held by its structure and by its queries.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlencode

import click
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sidecar.cli.main import main
from sidecar.telemetry.events import FIELDS
from sidecar.telemetry.metrics import TABLE
from tests.acceptance.conftest import (
    EXECUTE,
    PROJECT,
    Address,
    Backend,
    Program,
    ask,
    ask_json,
    scopegate,
    write_configuration,
)
from tests.reference import logs, metrics
from tests.reference.logs import EVERY_LINE
from tests.tools import tool

pytestmark = pytest.mark.slow

MONITORING = PROJECT / "config/monitoring"
RULES: dict[str, Any] = yaml.safe_load((MONITORING / "alerts.yaml").read_text(encoding="utf-8"))
ALERTS: dict[str, dict[str, Any]] = {
    rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]
}
UNIT_TESTS = (MONITORING / "alerts.test.yaml").read_text(encoding="utf-8")
DASHBOARD: dict[str, Any] = json.loads((MONITORING / "dashboard.json").read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]

FASTER = 60
SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
# Until an alert that the script has brought about must fire, on a slow machine, too.
FIRE_SECONDS = 20.0
RESPONSE_TIMEOUT = 0.4
IN_FLIGHT = 4

POLICIES = """
actions:
  retry_agent: {risk: low, max_cost_usd: 0.01}
  expensive: {risk: low, max_cost_usd: 0.0001}   # the backend says 0.001
  braked: {risk: low}
  conditional: {risk: low}
  frozen: {risk: low}
rules:
  - {id: storm, on: execute, match: {action: braked}, brake: {max_attempts: 1, window_seconds: 60}, reason: x}
  - {id: counted, on: execute, match: {action: conditional}, when: parameters.n > 1, effect: deny, reason: x}
  - {id: freeze, on: execute, match: {action: frozen}, effect: deny, reason: x}
  - {id: later, on: execute, match: {action: retry_agent}, effect: deny, mode: shadow, reason: x}
"""


# Prometheus ---------------------------------------------------------------------------------------------


@dataclass
class Prometheus:
    """One that scrapes twice a second, the alerts that it was seen to fire, and what those said."""

    address: Address
    process: subprocess.Popen[bytes]
    log: Path
    begun: float = field(default_factory=time.time)
    fired: set[str] = field(default_factory=set)
    told: set[str] = field(default_factory=set)

    def api(self, call: str, **parameters: str) -> Any:
        answer = ask(self.address, "GET", f"/api/v1/{call}?{urlencode(parameters)}").json()
        assert answer["status"] == "success", f"{call} {parameters}: {answer.get('error')}"
        return answer["data"]

    def look(self) -> None:
        """Remember what fires now."""
        firing = [alert for alert in self.api("alerts")["alerts"] if alert["state"] == "firing"]
        self.fired |= {alert["labels"]["alertname"] for alert in firing}
        self.told |= {text for alert in firing for text in alert["annotations"].values()}

    def until_fired(self, *names: str, meanwhile: Callable[[], object] = lambda: time.sleep(0.2)) -> None:
        end = time.monotonic() + FIRE_SECONDS
        while not self.fired.issuperset(names):
            if time.monotonic() > end:
                states = [
                    (each["labels"]["alertname"], each["state"]) for each in self.api("alerts")["alerts"]
                ]
                pytest.fail(f"{sorted(set(names) - self.fired)} never fired; at the end: {states}")
            meanwhile()
            self.look()

    def has_data(self, query: str) -> bool:
        """Whether the query gave a number at any time since the beginning."""
        found = self.api(
            "query_range", query=query, start=f"{self.begun}", end=f"{time.time()}", step="500ms"
        )
        return any(
            value not in ("NaN", "+Inf", "-Inf")
            for series in found["result"]
            for _, value in series["values"]
        )


def faster(text: str) -> str:
    """All times of an expression, or a wait, divided."""

    def shorter(told: re.Match[str]) -> str:
        seconds = int(told["count"]) * SECONDS[told["unit"]] // FASTER
        return f"{told['before']}{max(seconds, 1)}s"

    return re.sub(r"(?P<before>\[|offset |^)(?P<count>\d+)(?P<unit>[smhd])(?=\]|\b)", shorter, text)


def hurried_rules() -> dict[str, Any]:
    return {
        "groups": [
            {
                "name": group["name"],
                "rules": [
                    {
                        **rule,
                        "expr": faster(rule["expr"]),
                        **({"for": faster(rule["for"])} if "for" in rule else {}),
                    }
                    for rule in group["rules"]
                ],
            }
            for group in RULES["groups"]
        ]
    }


def start_prometheus(folder: Path, targets: list[Address]) -> Prometheus:
    (folder / "rules.yaml").write_text(yaml.safe_dump(hurried_rules()))
    watching = yaml.safe_load((MONITORING / "prometheus.yaml").read_text(encoding="utf-8"))
    watching["global"] = {
        "scrape_interval": "500ms",
        "scrape_timeout": "500ms",
        "evaluation_interval": "500ms",
    }
    watching["rule_files"] = ["rules.yaml"]
    (job,) = watching["scrape_configs"]
    job["static_configs"] = [{"targets": [f"{host}:{port}" for host, port in targets]}]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(watching))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address: Address = free.getsockname()
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                tool("prometheus"),
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address[0]}:{address[1]}",
                "--log.level=warn",
            ],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    return Prometheus(address, process, log)


def until_it_scrapes(prometheus: Prometheus, targets: int) -> None:
    """Twice each, so that whatever comes next is an increase."""
    end = time.monotonic() + FIRE_SECONDS
    while time.monotonic() < end and prometheus.process.poll() is None:
        with suppress(OSError, json.JSONDecodeError):
            found = prometheus.api("query", query="count_over_time(scopegate_build_info[10s]) > 1")
            if len(found["result"]) == targets:
                return
        time.sleep(0.1)
    pytest.fail(f"Prometheus does not scrape {targets} sidecars:\n{prometheus.log.read_text()}")


# The script ---------------------------------------------------------------------------------------------


def certificate(folder: Path, lasts: timedelta) -> dict[str, str]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + lasts)
        .sign(key, hashes.SHA256())
    )
    (folder / "tls.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "tls.key").write_bytes(secret)
    (folder / "tls.key").chmod(0o600)
    return {"certificate_file": "tls.crt", "key_file": "tls.key"}


def signed(folder: Path) -> dict[str, str]:
    """Checkpoints, in a file of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    assert scopegate("log", "keygen", folder / "log.key").returncode == 0
    return {"signing_key_file": "log.key", "checkpoint_file": "attested/checkpoints"}


@dataclass
class Script:
    """What happens to the sidecar, each step until the alerts that it must set off have fired."""

    sidecar: Program
    backend: Backend
    prometheus: Prometheus

    def scope(self, action: str, attempts: int = 10) -> str:
        body = {"incident_id": "inc-1", "action": action, "intent": "a test", "max_attempts": attempts}
        answer = ask_json(self.sidecar.data, "POST", "/api/v1/recovery/scope", body)
        assert answer.status == 201, answer
        return str(answer.json()["scope_id"])

    def execute(self, action: str, scope_id: str | None, **more: Any) -> int:
        body = {"scope_id": scope_id, "incident_id": "inc-1", "action": action, "parameters": {}, **more}
        return ask_json(self.sidecar.data, "POST", EXECUTE, body).status

    def ordinary(self) -> None:
        """Scopes, executions, decisions of others, requests that pass through, a reload."""
        assert self.execute("retry_agent", self.scope("retry_agent")) == 200
        assert ask_json(self.sidecar.data, "POST", "/elsewhere", {"some": "thing"}).status == 200
        assert ask(self.sidecar.data, "GET", "/elsewhere").status == 501  # recorded; there is no such page
        told = {
            "run_id": "run-1",
            "budget_requested": 200,
            "budget_available": 100,
            "enforcement": "hard",
        }
        assert ask_json(self.sidecar.admin, "POST", "/api/v1/decisions/budget", told).status == 201
        actions = self.sidecar.config.parent / "policies" / "actions.yaml"
        write(actions, POLICIES + "# a change\n")
        assert ask(self.sidecar.admin, "POST", "/api/v1/reload").status == 200

    def refusals(self) -> None:
        """Of every sort that is somebody's to look into."""
        assert self.execute("retry_agent", None) == 400
        for _ in range(15):
            assert self.execute("retry_agent", "scope_invented") == 404
        braked = self.scope("braked")
        assert [self.execute("braked", braked) for _ in range(9)] == [200, *[429] * 8]
        assert self.execute("conditional", self.scope("conditional")) == 403
        frozen = self.scope("frozen")
        assert self.execute("frozen", frozen) == 403
        assert ask(self.sidecar.data, "POST", EXECUTE.replace("/exec", "%2Fexec")).status == 400
        assert self.execute("expensive", self.scope("expensive")) == 200
        self.prometheus.until_fired(
            "ScopegatePossibleMisuse",
            "ScopegateBrakesHold",
            "ScopegateConditionErrors",
            "ScopegateShadowRefusals",
            "ScopegateCostOverruns",
            meanwhile=lambda: [self.execute("braked", braked), self.execute("retry_agent", "scope_invented")],
        )

    def a_refused_reload(self) -> None:
        write(
            self.sidecar.config.parent / "policies" / "actions.yaml", "actions: {retry_agent: {risk: tiny}}\n"
        )
        assert ask(self.sidecar.admin, "POST", "/api/v1/reload").status == 409

    def a_backend_that_hangs(self) -> None:
        """More requests than may be in flight: some time out, some are turned away; others pass in vain."""
        self.backend.go_on.clear()
        with ThreadPoolExecutor(3 * IN_FLIGHT) as pool:

            def crowd() -> None:
                scope_id = self.scope("retry_agent")
                gated = [pool.submit(self.execute, "retry_agent", scope_id) for _ in range(2 * IN_FLIGHT)]
                passing = [
                    pool.submit(ask_json, self.sidecar.data, "POST", "/elsewhere", {"some": "thing"})
                    for _ in range(2)
                ]
                statuses = {each.result() for each in gated} | {each.result().status for each in passing}
                assert statuses == {503, 504}

            self.prometheus.until_fired(
                "ScopegateOverloaded",
                "ScopegateBackendTimingOut",
                "ScopegatePassThroughFailing",
                "ScopegateUnknownExecutions",
                meanwhile=crowd,
            )
        self.backend.go_on.set()

    def a_store_that_is_gone(self) -> None:
        """While an execution is under way, whose end then has to wait."""
        away = self.sidecar.store.with_name("moved.db")
        scope_id = self.scope("retry_agent")
        self.backend.go_on.clear()
        executed = len(self.backend.seen)
        with ThreadPoolExecutor(1) as pool:
            under_way = pool.submit(self.execute, "retry_agent", scope_id)
            self.sidecar.until("is executed", lambda: len(self.backend.seen) > executed)
            os.rename(self.sidecar.store, away)
            assert under_way.result() == 504
        self.backend.go_on.set()

        def knock() -> None:
            assert self.execute("retry_agent", scope_id) == 503
            time.sleep(0.1)

        self.prometheus.until_fired(
            "ScopegateNotReady",
            "ScopegateOutcomesUnsettled",
            "ScopegateStoreFailures",
            "ScopegateUnrecordedRefusals",
            meanwhile=knock,
        )
        os.rename(away, self.sidecar.store)
        self.sidecar.until("is ready", lambda: ask(self.sidecar.ops, "GET", "/health/ready").status == 200)
        self.sidecar.until("has settled", lambda: self.gauge("scopegate_unsettled") == 0)

    def a_flood(self) -> None:
        body = json.dumps({"incident_id": "inc-1", "action": "retry_agent"}).encode()
        head = [("Content-Type", "application/json")]
        with ThreadPoolExecutor(16) as pool:

            def some() -> None:
                done = [pool.submit(ask, self.sidecar.data, "POST", EXECUTE, head, body) for _ in range(200)]
                # 503 where there is no room for one; that is a refusal, too
                assert {400} <= {each.result().status for each in done} <= {400, 503}

            self.prometheus.until_fired("ScopegateRefusalFlood", "ScopegateRefusalsJump", meanwhile=some)

    def a_backend_that_is_gone(self) -> None:
        """To be called once it has ended."""
        scope_id = self.scope("retry_agent")

        def knock() -> None:
            assert self.execute("retry_agent", scope_id) == 502

        self.prometheus.until_fired("ScopegateBackendUnreachable", meanwhile=knock)

    def gauge(self, name: str) -> float:
        page = ask(self.sidecar.ops, "GET", "/metrics").body.decode()
        (value,) = re.findall(rf"^{name} (\S+)$", page, re.MULTILINE)
        return float(value)


def write(file: Path, text: str) -> None:
    """One rename puts the file in its place, so that it is never read half."""
    file.with_name(".new").write_text(text)
    os.replace(file.with_name(".new"), file)


@dataclass(frozen=True)
class Seen:
    """The end of the script: Prometheus still runs and knows it all."""

    prometheus: Prometheus
    page: str
    log: list[dict[str, Any]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    tool("prometheus")
    folder = tmp_path_factory.mktemp("monitoring")
    with ExitStack() as stack:
        backend = Backend()
        with backend:
            config = write_configuration(
                folder / "main",
                backend.address,
                upstream={"response_timeout_seconds": RESPONSE_TIMEOUT},
                gate={"max_in_flight": IN_FLIGHT, "unlisted": {"reads": "record"}},
                log=signed(folder / "main"),
            )
            (config.parent / "policies" / "actions.yaml").write_text(POLICIES)
            # A second one, with a certificate that ends soon and a checkpoint file that is none.
            (folder / "other" / "attested").mkdir(parents=True)
            (folder / "other" / "attested" / "checkpoints").write_text("something else\n")
            other = write_configuration(
                folder / "other",
                backend.address,
                data={"tls": certificate(folder / "other", timedelta(days=1))},
                log=signed(folder / "other"),
            )
            sidecar = stack.enter_context(Program(config))
            ending = stack.enter_context(Program(other))
            prometheus = start_prometheus(folder, [sidecar.ops, ending.ops])
            stack.callback(stop, prometheus.process)
            until_it_scrapes(prometheus, 2)
            script = Script(sidecar, backend, prometheus)
            assert ask(ending.admin, "PUT", "/api/v1/care/kill-switch").status == 200
            script.ordinary()
            script.refusals()
            script.a_refused_reload()
            script.a_backend_that_hangs()
            script.a_store_that_is_gone()
            prometheus.until_fired(
                "ScopegateCheckpointsFailing",
                "ScopegateCertificateExpires",
                "ScopegateCertificateExpiresSoon",
            )
            ending.kill()
            script.a_flood()
        script.a_backend_that_is_gone()
        prometheus.until_fired("ScopegateDown", "ScopegateReloadRefused")
        page = ask(sidecar.ops, "GET", "/metrics").body.decode()
        yield Seen(prometheus, page, sidecar.log_lines())


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# What the script must have shown ------------------------------------------------------------------------


def test_every_query_of_the_dashboard_returns_data(seen: Seen) -> None:
    assert len(QUERIES) >= 50
    silent = [(title, query) for title, query in QUERIES if not seen.prometheus.has_data(filled_in(query))]
    assert silent == []


def filled_in(query: str) -> str:
    """As Grafana asks it, all jobs and instances chosen; without what it shows where there is nothing."""
    for variable, value in {"$job": ".*", "$instance": ".*", "$__rate_interval": "5s"}.items():
        query = query.replace(variable, value)
    assert "$" not in query
    return query.removesuffix(" or vector(0)")


@pytest.mark.parametrize("name", ALERTS)
def test_every_selector_of_an_alert_finds_series(seen: Seen, name: str) -> None:
    found = selectors(ALERTS[name]["expr"])
    assert found
    assert [one for one in found if not seen.prometheus.has_data(one)] == []


def selectors(expr: str) -> list[str]:
    """The names of series in an expression, each with its matchers; every metric is ours, or `up`."""
    return re.findall(r"\b(?:scopegate_\w+|up)\b(?:\{[^}]*\})?", expr)


def test_an_alert_is_seen_firing_or_held_by_a_test_of_its_rule(seen: Seen) -> None:
    """Each that the script must cause was waited for; what it cannot cause is tested with made-up series."""
    made_up = set(re.findall(r'alertname="(\w+)"\}\'?, value: 1', UNIT_TESTS))
    assert len(seen.prometheus.fired) >= 20
    assert set(ALERTS) - seen.prometheus.fired - made_up == set()
    assert made_up <= set(ALERTS)


def test_rules_can_be_evaluated_and_alerts_say_what_they_should(seen: Seen) -> None:
    groups = seen.prometheus.api("rules")["groups"]
    assert {rule["name"]: rule.get("lastError") for group in groups for rule in group["rules"]} == (
        dict.fromkeys(ALERTS)
    )
    assert len(seen.prometheus.told) >= 40
    assert [text for text in seen.prometheus.told if re.search(r"<no value>|error|%!|\{\{", text)] == []


def test_the_reference_knows_every_label_value_and_every_log_field_of_the_run(seen: Seen) -> None:
    known = {
        (row.family, name): {*label}
        for row in TABLE
        for name, label in row.labels.items()
        if not isinstance(label, str)
    }
    series = re.findall(r"^(scopegate_\w+?)(?:_total)?\{(.+)\} ", seen.page, re.MULTILINE)
    labels = {(name, *pair) for name, told in series for pair in re.findall(r'(\w+)="([^"]*)"', told)}
    assert len(labels) > 50
    assert [each for each in labels if each[2] not in known.get(each[:2], {each[2]})] == []
    assert len(seen.log) > 50
    assert {key for line in seen.log for key in line} - {*EVERY_LINE, *FIELDS} == set()


# The files themselves -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "alerts.yaml"),
        ("check", "config", "prometheus.yaml"),
        ("test", "rules", "alerts.test.yaml"),
    ],
    ids=" ".join,
)
def test_promtool_finds_no_fault(arguments: tuple[str, ...]) -> None:
    ran = subprocess.run(
        [tool("promtool"), *arguments],
        cwd=MONITORING,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_alert_says_how_urgent_it_is_and_what_to_do() -> None:
    for group in RULES["groups"]:
        for rule in group["rules"]:
            assert rule["labels"] == {"severity": group["name"].removeprefix("scopegate-")}, rule["alert"]
            assert rule["annotations"].keys() == {"summary", "description"}, rule["alert"]
            assert "`" in rule["annotations"]["description"], rule["alert"]


@pytest.mark.parametrize(
    "page", [MONITORING / "README.md", metrics.PAGE, logs.PAGE], ids=lambda page: page.name
)
def test_every_link_of_the_pages_resolves(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    anchors = {
        "#" + re.sub(r"[^\w\- ]", "", head.lower()) for head in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    links = set(re.findall(r"\]\(([^)]+)\)", text)) - anchors
    assert links
    assert [link for link in links if not (page.parent / link.partition("#")[0]).is_file()] == []


def test_every_command_that_an_alert_names_exists() -> None:
    told = " ".join(rule["annotations"]["description"] for rule in ALERTS.values())
    commands = set(re.findall(r"`scopegate ([^`]+)`", told))
    assert len(commands) > 10
    for line in commands:
        words, command = shlex.split(line), cast(click.Command | None, main)
        while isinstance(command, click.Group):
            command = command.get_command(click.Context(command), words.pop(0))
        assert command is not None, line
        options = {name for each in command.params for name in each.opts}
        assert [word for word in words if word.startswith("--") and word not in options] == [], line


def test_the_windows_of_alerts_are_made_shorter_and_their_thresholds_are_not() -> None:
    assert (
        faster("increase(a[5m]) > 4 * 3600 and b offset 2m >= 0.5")
        == "increase(a[5s]) > 4 * 3600 and b offset 2s >= 0.5"
    )
    assert (faster("2m"), faster("1h"), faster("10s")) == ("2s", "60s", "1s")


def test_panels_have_places_of_their_own() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies over {taken[x, y]}"
                taken[x, y] = panel["title"]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_every_panel_says_what_it_shows_and_asks_the_datasource_that_was_chosen() -> None:
    chosen = {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    assert variables.keys() == {"DS_PROMETHEUS", "job", "instance"}
    assert (variables["DS_PROMETHEUS"]["type"], variables["DS_PROMETHEUS"]["query"]) == (
        "datasource",
        "prometheus",
    )
    for name in ("job", "instance"):
        assert variables[name]["datasource"] == chosen
        assert re.fullmatch(rf"label_values\(scopegate_build_info.*, {name}\)", variables[name]["definition"])
    for panel in PANELS:
        assert panel["title"]
        assert "Normal" in panel["description"] or len(panel["description"]) > 60, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == chosen, panel["title"]
        for target in panel["targets"]:
            assert target["datasource"] == chosen, panel["title"]
            for selector in selectors(target["expr"]):
                assert 'job=~"$job", instance=~"$instance"' in selector, panel["title"]


def test_every_metric_is_on_the_dashboard_or_in_an_alert() -> None:
    shown = " ".join([query for _, query in QUERIES] + [rule["expr"] for rule in ALERTS.values()])
    assert [row.name for row in TABLE if row.family not in shown] == []

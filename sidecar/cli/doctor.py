"""`scopegate doctor`: looks at the files, the backend and the running sidecar, and says what is exposed.

1. Nothing is sent that could execute an action. The backend is asked with HEAD for a gated path, or with
   OPTIONS where HEAD is gated there. The gate is asked to execute without a scope, which it must refuse, only
   once the admin listener has shown that a sidecar of this configuration serves that address.
2. What cannot be tried is said, and is not taken for good.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidecar.cli.access import address_of, certificate_of
from sidecar.cli.client import Caller, Endpoint, ProblemError, Trust, UnreachableError, UnusableError
from sidecar.cli.credentials import Token, TokenUnusableError, token_of
from sidecar.cli.findings import Finding, of_files
from sidecar.cli.options import (
    FAILED,
    FILE,
    config_option,
    contents_of,
    files_of,
    json_option,
    misconfigured,
    set_option,
    tell,
)
from sidecar.cli.tables import cell
from sidecar.core.instant import SECOND, parse_time
from sidecar.core.policy import RiskClass
from sidecar.files.keyfiles import KeyFileUnusable, header_value
from sidecar.settings.addresses import Address, Listen

if TYPE_CHECKING:
    from sidecar.live.reload import Contents
    from sidecar.settings.routes import Route
    from sidecar.settings.sections import Settings

SECONDS = 3.0
SKEW_SECONDS = 5.0
# The answers by which a backend asks for a credential.
ASKS = (401, 403, 407)
# The answers that do not say whether the backend demands a credential: it has no such path, or is not there.
UNCLEAR = (404, 410, 421, 429, 502, 503, 504)
# What stands before the paths of `**/x`, as the recovery API has it.
USUAL_PREFIX = "/api/v1"
# What stands for each variable of a path. No backend should know such a thing.
NO_SUCH = "scopegate-doctor"


@dataclass(slots=True)
class Examination:
    """What was looked at, what was found, and what could not be tried."""

    looked_at: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    not_tried: list[str] = field(default_factory=list)

    def add(self, what: str, findings: Iterable[Finding]) -> None:
        self.looked_at.append(what)
        self.findings += findings

    def to_dict(self) -> dict[str, Any]:
        notes = [each for each in self.findings if each.level == "note"]
        return {
            "exposed": any(each.level == "exposed" for each in self.findings),
            "findings": [each.to_dict() for each in self.findings if each not in notes],
            "notes": [each.to_dict() for each in notes],
            "not_tried": self.not_tried,
            "looked_at": self.looked_at,
        }


@click.command(
    epilog="""\b
Examples:
  scopegate doctor --config config/scopegate.yaml
  scopegate doctor --token-file observer.token --json | jq -r '.findings[].code'
  scopegate doctor --offline          look at the files only
\b
What is sent: HEAD of a gated path to the backend (OPTIONS where HEAD is gated), with and without the
credential of upstream.credentials; GET /api/v1/status to the admin listener; and one execution without a
scope to the data listener, which leaves a record of its refusal."""
)
@config_option
@set_option
@click.option("--offline", is_flag=True, help="Look at the files only, and ask neither backend nor sidecar.")
@click.option("--token-file", type=FILE, metavar="FILE", help="A token of an observer, to ask the sidecar.")
@click.option("--cert", type=FILE, metavar="FILE", help="TLS: the client certificate to send (PEM).")
@click.option("--key", type=FILE, metavar="FILE", help="TLS: the key of --cert (PEM).")
@json_option
def doctor(
    config: Path,
    overrides: tuple[str, ...],
    token_file: Path | None,
    cert: Path | None,
    key: Path | None,
    *,
    offline: bool,
    as_json: bool,
) -> None:
    """Say what is exposed: by the files, at the backend, and by the running sidecar. Each has its remedy.

    Exit code 1 if something is exposed, 0 if not, 2 if the configuration cannot be read.
    """
    import os

    if key is not None and cert is None:
        raise click.UsageError("give the certificate that --key belongs to with --cert")
    contents = contents_of(files_of(config, overrides))
    try:
        token = token_of(token_file, os.environ)
    except TokenUnusableError as exc:
        misconfigured(str(exc))
    examination = Examination()
    steps: list[tuple[str, Callable[[], None]]] = [
        ("the files", lambda: examination.add("the files", of_files(contents, time.time_ns() // 1_000)))
    ]
    if not offline:
        settings = contents.loaded.settings
        patient = Patient(settings, token, Trust(certificate=cert, key=key))
        steps += [
            ("the backend", lambda: at_the_backend(patient, examination)),
            ("the sidecar", lambda: at_the_sidecar(patient, contents, examination)),
        ]
    with click.progressbar(
        steps, label="Looking at", item_show_func=_shown, file=sys.stderr, hidden=not sys.stderr.isatty()
    ) as bar:
        for _, look in bar:
            look()
    found = examination.to_dict()
    if as_json:
        tell(found)
    else:
        _tell(examination)
    sys.exit(FAILED if found["exposed"] else 0)


def _shown(step: tuple[str, Any] | None) -> str:
    return "" if step is None else step[0]


@dataclass(frozen=True, slots=True)
class Patient:
    """The sidecar of a configuration and its backend, and how to call them."""

    settings: Settings
    token: Token | None
    trust: Trust

    @property
    def backend(self) -> Caller:
        upstream = self.settings.upstream
        trust = Trust(
            ca=upstream.tls.ca_file, certificate=upstream.tls.certificate_file, key=upstream.tls.key_file
        )
        place = Endpoint(address=upstream.address, tls=upstream.verified_name is not None)
        return Caller(name="upstream", place=place, trust=trust, token=None, timeout=SECONDS)

    def listener(self, name: Any, token: Token | None) -> Caller:
        pinned = certificate_of(self.settings, name)
        trust = Trust(pinned=pinned, certificate=self.trust.certificate, key=self.trust.key)
        place = address_of(name, self.settings, None)
        return Caller(name=name, place=place, trust=trust, token=token, timeout=SECONDS)


# The backend --------------------------------------------------------------------------------------------


def at_the_backend(patient: Patient, examination: Examination) -> None:
    """Whether the backend answers from here without the gate."""
    route = next((each for each in patient.settings.gate.routes), None)
    if route is None:
        examination.not_tried.append("The backend was not asked, because no route is gated.")
        return
    method, path = harmless(route)
    try:
        bare, headers, _ = patient.backend.exchange(method, path)
        held = _with_credentials(patient, method, path)
    except (UnreachableError, UnusableError, KeyFileUnusable) as exc:
        examination.looked_at.append("the backend, to which this host cannot connect")
        if not isinstance(exc, UnreachableError) or "refused" not in str(exc):
            examination.not_tried.append(f"The backend was not asked from here: {_reason(exc)}.")
        return
    asked = f"{method} {path}"
    findings = list(_skew(headers.get("Date"), "the backend"))
    if bare in UNCLEAR:
        what = "which does not say whether it demands a credential"
        examination.not_tried.append(f"The backend answers {asked} with {bare}, {what}.")
    elif bare not in ASKS:
        same = "" if held is None else f", as it does with the credential ({held})"
        findings.append(
            Finding(
                "backend_answers_ungated",
                f"From here the backend answers {asked} without the gate and a credential: {bare}{same}",
            )
        )
    elif held in ASKS:
        findings.append(
            Finding(
                "backend_rejects_credential", f"The backend answers {asked} with {held} to the credential"
            )
        )
    examination.add(f"the backend: {asked}", findings)


def _with_credentials(patient: Patient, method: str, path: str) -> int | None:
    """The status of the answer to the credentials in custody; None if there are none."""
    held = [each for each in patient.settings.upstream.credentials if "gated" in each.on]
    if not held:
        return None
    headers = {each.header: header_value(each.value_file) for each in held}
    return patient.backend.exchange(method, path, headers=headers)[0]


def harmless(route: Route) -> tuple[str, str]:
    """A request for the path of a route that executes nothing there: HEAD, or OPTIONS where HEAD is gated."""
    gated = {"GET", "HEAD"} & set(route.methods)
    return "OPTIONS" if gated else "HEAD", path_of(route)


def path_of(route: Route) -> str:
    """A path that the route gates."""
    pattern = route.path.patterns[0]
    before = USUAL_PREFIX if pattern.text.startswith("**/") else ""
    return before + pattern.filled(NO_SUCH)


def _skew(date: str | None, whose: str) -> Iterator[Finding]:
    """Whether a clock differs from that of this host. `date` is as in HTTP, or in ISO 8601."""
    if date is None:
        return
    try:
        theirs = parsedate_to_datetime(date).timestamp() if "," in date else parse_time(date) / SECOND
    except (ValueError, TypeError, OverflowError):
        return
    skew = theirs - time.time()
    if abs(skew) > SKEW_SECONDS:
        ahead = "ahead of" if skew > 0 else "behind"
        yield Finding("clock_skew", f"The clock of {whose} is {abs(skew):.0f} s {ahead} that of this host")


# The sidecar --------------------------------------------------------------------------------------------


def at_the_sidecar(patient: Patient, contents: Contents, examination: Examination) -> None:
    """What the running sidecar says of itself, and whether it refuses what it must."""
    from sidecar.live.snapshot import Snapshot
    from sidecar.web.wire import answers

    examination.add("addresses of this host beyond loopback", _beyond_loopback(patient.settings))
    if any(_is_any_port(each.listen) for each in (patient.settings.admin, patient.settings.data)):
        examination.not_tried.append(
            "The running sidecar was not asked, because its ports are any free ones."
        )
        return
    try:
        answer = patient.listener("admin", patient.token).get("/api/v1/status", answers.Status)
    except (UnreachableError, UnusableError) as exc:
        examination.not_tried.append(f"The running sidecar was not asked: {_reason(exc)}.")
        return
    except ProblemError as exc:
        advice = "give a token of an observer with --token-file"
        examination.not_tried.append(f"The running sidecar does not answer ({exc}); {advice}.")
        return
    status = answer.body
    findings = list(_skew(answer.date, "the sidecar"))
    if not status["ready"]:
        findings.append(Finding("not_ready", "The sidecar is not ready, so it refuses every execution"))
    snapshot = Snapshot(contents.loaded.settings, contents.policies)
    running = (status["config_revision"], status["policy_revision"])
    if running != (snapshot.revision, contents.policies.revision):
        what = "The running sidecar has other settings or policies than these files"
        findings.append(Finding("stale_configuration", what))
    elif status["ready"]:
        findings += _through_the_gate(patient, examination)
    examination.add("the running sidecar: its status", findings)


def _is_any_port(address: Address) -> bool:
    return isinstance(address, Listen) and address.port == 0


def _through_the_gate(patient: Patient, examination: Examination) -> Iterator[Finding]:
    """Whether an execution without a scope is refused."""
    gate = patient.settings.gate
    route = next((each for each in gate.routes if each.mode == "enforce"), None)
    if route is None or gate.scope_required_from > RiskClass.LOW:
        examination.not_tried.append("The gate was not asked, because it may let through what has no scope.")
        return
    path = path_of(route)
    try:
        status, headers, text = patient.listener("data", None).exchange(
            route.methods[0], path, b"{}", {"Content-Type": "application/json"}
        )
    except (UnreachableError, UnusableError) as exc:
        examination.not_tried.append(f"The gate was not asked: {_reason(exc)}.")
        return
    asked = f"{route.methods[0]} {path}"
    examination.looked_at.append(f"the gate: {asked} without a scope")
    ours = headers.get("Content-Type", "").startswith("application/problem+json") and "urn:scopegate:" in text
    if status < 400 or not ours:
        yield Finding("gate_lets_through", f"The data listener answers {asked} without a scope: {status}")


def _beyond_loopback(settings: Settings) -> Iterator[Finding]:
    """Whether the admin interface answers without TLS on an address that other hosts can reach."""
    listen = settings.admin.listen
    if isinstance(listen, Listen) and listen.port and settings.admin.tls.certificate_file is None:
        for address in outside_addresses():
            yield from admin_on(Listen(address, listen.port))


def admin_on(place: Listen) -> Iterator[Finding]:
    """Whether a sidecar's admin interface answers there, without TLS."""
    caller = Caller(name="admin", place=Endpoint(address=place), trust=Trust(), token=None, timeout=SECONDS)
    try:
        status, headers, text = caller.exchange("GET", "/api/v1/status")
    except (UnreachableError, UnusableError):
        return
    if headers.get("Server", "").startswith("scopegate") or "urn:scopegate:" in text:
        yield Finding("admin_reachable", f"The admin interface answers on {place} without TLS: {status}")


def outside_addresses() -> list[str]:
    """The addresses of this host that other hosts may reach."""
    found: dict[str, None] = {}
    for family, target in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        # To connect a UDP socket sends nothing; it only finds the address that would be used.
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((target, 9))
                found[probe.getsockname()[0]] = None
        except OSError:
            continue
    return [address for address in found if not Listen(address, 1).is_loopback()]


def _reason(exc: Exception) -> str:
    return str(exc).partition("; ")[0].rstrip(".")


# Output -------------------------------------------------------------------------------------------------

_HEADS = {"exposed": "EXPOSED", "warning": "Warnings", "note": "Good to know"}


def _tell(examination: Examination) -> None:
    for level, head in _HEADS.items():
        found = [each for each in examination.findings if each.level == level]
        if found:
            click.echo(f"{head}:")
        for each in found:
            click.echo(f"  {each.code}: {cell(each.what)}.")
            click.echo(f"    Remedy: {each.remedy}.")
        if found:
            click.echo()
    if examination.not_tried:
        click.echo("Not tried:")
        for what in examination.not_tried:
            click.echo(f"  {cell(what)}")
        click.echo()
    exposed = sum(each.level == "exposed" for each in examination.findings)
    verdict = (
        f"{exposed} {'way' if exposed == 1 else 'ways'} past the gate" if exposed else "Nothing is exposed"
    )
    click.echo(f"{verdict}, as far as this host can see. Looked at: {'; '.join(examination.looked_at)}.")

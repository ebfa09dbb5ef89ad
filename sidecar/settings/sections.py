"""The sections of the configuration, key by key as they stand in the file.

The type of a key says what it accepts (see `values` and `numbers`), and LIVE says that a reload may change
it. The text below it is its description in config/scopegate.yaml, the reference and the schema. Conditions on
several keys are checked here, such as those on the files of a `tls` section.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, model_validator

from sidecar.clock import SETTLE_SECONDS
from sidecar.core.host import Host, answers_to
from sidecar.core.masking import Mask, pointer
from sidecar.core.targetheaders import read_as
from sidecar.files import keyfiles, tls
from sidecar.files.yamlfile import KeyPath
from sidecar.settings.addresses import Address, Listen, SocketFile
from sidecar.settings.auth import AuthSection
from sidecar.settings.credentials import CredentialSection
from sidecar.settings.faults import Contradiction, refuse
from sidecar.settings.keys import LIVE, SECRET, Key, Section, keys
from sidecar.settings.numbers import Count, Dollars, Fraction, Grace, Lifetime, Seconds
from sidecar.settings.routes import GateSection
from sidecar.settings.values import (
    LIST,
    AllowedHost,
    CollectorUrl,
    File,
    Folder,
    HostName,
    ListenAddress,
    MaskKeyFile,
    MaskPointer,
    SigningKeyFile,
    StoreUrl,
    UpstreamUrl,
    reads_keys,
)

_NO_CERTIFICATE = "has no effect without certificate_file; set both"


class ListenTlsSection(Section):
    """TLS on the listener. Without a certificate the listener speaks plain HTTP."""

    certificate_file: File = None
    """The certificate in PEM, followed by those between it and its authority. With it the listener speaks
    TLS. A renewed file is used without a restart."""
    key_file: File = None
    """The private key of the certificate, without a passphrase."""
    client_ca_file: File = None
    """The authorities that sign client certificates. With it a client needs a certificate, unless
    `client_certificate` says otherwise."""
    client_certificate: Literal["required", "optional"] | None = None
    """Whether a client needs a certificate: `required` (as `null`) or `optional`. With `optional` a client
    may also connect without one, and present a token instead. A certificate of another authority is refused
    all the same. It needs `client_ca_file`."""

    @model_validator(mode="after")
    def _what_belongs_together(self, info: ValidationInfo) -> ListenTlsSection:
        refuse(
            *_half_a_pair(self.certificate_file, self.key_file),
            (self.client_ca_file and not self.certificate_file, ("client_ca_file",), _NO_CERTIFICATE),
            (
                self.client_certificate and not self.client_ca_file,
                ("client_certificate",),
                "has no effect without client_ca_file; set both",
            ),
        )
        if self.certificate_file is not None:
            _try(lambda: tls.server_context(**self.files()), info)
        return self

    @property
    def is_certificate_optional(self) -> bool:
        """Whether a client may connect without a certificate although `client_ca_file` is set."""
        return self.client_certificate == "optional"

    def files(self) -> dict[str, Any]:
        """As `tls.server_context` takes them."""
        return {name: getattr(self, name) for name in ("certificate_file", "key_file", "client_ca_file")}


class UpstreamTlsSection(Section):
    """TLS towards the backend, which an `https` url turns on."""

    ca_file: File = None
    """The authorities that sign the certificate of the backend (PEM). `null`: those that the system
    trusts."""
    certificate_file: File = None
    """The client certificate that the sidecar shows to the backend."""
    key_file: File = None
    """The private key of the client certificate, without a passphrase."""
    server_name: HostName = None
    """The name in the certificate of the backend, if it is not the host of the url."""

    @model_validator(mode="after")
    def _what_belongs_together(self, info: ValidationInfo) -> UpstreamTlsSection:
        refuse(*_half_a_pair(self.certificate_file, self.key_file))
        if any(self.files().values()):
            _try(lambda: tls.client_context(**self.files()), info)
        return self

    def files(self) -> dict[str, Any]:
        """As `tls.client_context` takes them."""
        return {name: getattr(self, name) for name in ("ca_file", "certificate_file", "key_file")}


def _half_a_pair(certificate: Path | None, key: Path | None) -> list[tuple[object, KeyPath, str]]:
    return [
        (
            certificate and not key,
            ("certificate_file",),
            "requires key_file; name the key of the certificate",
        ),
        (key and not certificate, ("key_file",), _NO_CERTIFICATE),
    ]


def _try(make: Callable[[], object], info: ValidationInfo) -> None:
    """Whether TLS can use the files, unless the context says that keys are not read."""
    if reads_keys(info):
        try:
            make()
        except tls.TlsFileUnusable as exc:
            raise Contradiction(((exc.key,), exc.reason)) from exc


class DataSection(Section):
    """The listener for clients: the proxy, and the calls that issue, list and revoke scopes."""

    listen: ListenAddress = Listen("127.0.0.1", 8000)
    """The address for clients: `host:port`, or `unix:/path` for a Unix socket. `"[::]"` (in quotes) is every
    interface by IPv6 and IPv4, `0.0.0.0` is IPv4 only, port 0 is any free port. Everyone who can reach it can
    request scopes, so keep loopback if the client runs in the same pod."""
    allowed_hosts: Annotated[tuple[AllowedHost, ...] | None, LIST, LIVE] = None
    """The host names, without port, under which the scope calls answer, besides loopback names such as
    `localhost`. Another Host gets 421, so that a web page cannot reach these calls through a browser.
    Requests that pass through may have any Host. `null`: loopback names only if it listens on loopback, any
    name otherwise. See [Hosts and browsers](#hosts-and-browsers)."""
    tls: ListenTlsSection

    @property
    def hosts(self) -> tuple[str, ...] | None:
        """The names besides loopback ones under which the calls of the sidecar itself answer; None: any."""
        listens_on_loopback = isinstance(self.listen, Listen) and self.listen.is_loopback()
        return () if self.allowed_hosts is None and listens_on_loopback else self.allowed_hosts


class AdminSection(Section):
    """The listener for operators: decisions, open executions, reconciling, reload."""

    listen: ListenAddress = Listen("127.0.0.1", 9901)
    """The address for operators. Beyond loopback and Unix sockets it needs a method of `auth`, and
    `admin.tls.certificate_file`."""
    allowed_hosts: Annotated[tuple[AllowedHost, ...], LIST, LIVE] = ()
    """The host names, without port, under which these calls answer, besides loopback names. Another Host gets
    421. If the list is empty, any name is accepted on a Unix socket, and beyond loopback, where a browser
    connects only under a name in the certificate. With `auth.proxy` a listener beyond loopback answers only
    under the names of this list, because the browser then sees the certificate of the proxy. See [Hosts and
    browsers](#hosts-and-browsers)."""
    tls: ListenTlsSection


class OpsSection(Section):
    """The listener for the platform: `/health/live`, `/health/ready` and `/metrics`, nothing else."""

    listen: ListenAddress = Listen("127.0.0.1", 9902)
    """The address for probes and Prometheus. Open it to other hosts if they connect from outside the pod."""
    tls: ListenTlsSection


class UpstreamSection(Section):
    """The backend that executes recovery actions. Requests that are not gated pass to it untouched."""

    url: UpstreamUrl = Field(examples=["http://127.0.0.1:9000"])
    """The backend: `http://host:port`, `https://host:port`, or `unix:/path` for HTTP over a Unix socket,
    without path and credentials. This is the only key that must be set."""
    connect_timeout_seconds: Seconds = 2.0
    """Seconds to establish a connection. Nothing was sent before, so a failure gives the attempt back."""
    response_timeout_seconds: Annotated[Seconds, LIVE] = 30.0
    """Seconds until a gated answer is complete, or a pass-through answer has begun. A gated execution that
    takes longer is `unknown` until it is reconciled. Set it above your slowest action, or give that action
    its own `timeout_seconds` in the policies."""
    reuse_idle_seconds: Grace = 1.0
    """Seconds for which an idle connection may be used again. Keep it below the keep-alive time of the
    backend, because a request can otherwise meet a connection that is closing. 0 opens a new connection for
    each request."""
    max_connections: Count = 512
    """Connections to the backend. Pass-through requests may hold three quarters of them, so that endless
    streams and WebSockets leave room for gated requests. Raise it for many slow streams."""
    tls: UpstreamTlsSection
    credentials: Annotated[tuple[CredentialSection, ...], LIST] = ()
    """Headers that the sidecar sets from files, so that callers do not hold the credential of the backend:
    `[{header: Authorization, value_file: backend-token, on: [gated]}]`. See
    [Custody](who.md#custody)."""

    @property
    def address(self) -> Address:
        """Where the backend listens."""
        scheme, _, rest = self.url.partition(":")
        return SocketFile(Path(rest)) if scheme == "unix" else Listen.parse(rest.removeprefix("//"))

    @property
    def verified_name(self) -> str | None:
        """The name or the IP address that the backend's certificate must have; None without TLS."""
        if not self.url.startswith("https:") or not isinstance(self.address, Listen):
            return None
        return self.tls.server_name or self.address.host

    @model_validator(mode="after")
    def _tls_where_it_is_spoken(self) -> UpstreamSection:
        plain = not self.url.startswith("https:")
        message = "has no effect without https; write url: https://host:port, or remove this key"
        refuse(*((plain and value, ("tls", name), message) for name, value in self.tls))
        return self

    @model_validator(mode="after")
    def _each_header_once(self) -> UpstreamSection:
        taken: dict[tuple[str, str], int] = {}
        twice: list[tuple[object, KeyPath, str]] = []
        for number, each in enumerate(self.credentials):
            for area in each.on:
                first = taken.setdefault((read_as(each.header), area), number)
                message = f"is the header of credentials[{first}] on {area}, too; keep one of them"
                twice.append((first != number, ("credentials", number, "header"), message))
        refuse(*twice)
        return self


class StoreSection(Section):
    """The database for scopes, attempts and the decision log. Gated requests are refused without it."""

    url: Annotated[StoreUrl, SECRET] = Field("sqlite:///var/scopegate.db", validate_default=True)
    """`sqlite:///file` relative to the configuration file, or `sqlite:////file` absolute. One sidecar per
    file, on a local disk that survives restarts. `memory://` is for tests; `scopegate run` refuses it."""
    deadline_seconds: Seconds = 2.0
    """Seconds for a decision to become durable. A request that waits longer is refused with 503, and nothing
    is forwarded."""

    @property
    def file(self) -> Path | None:
        """The database file, absolute; None for a store in memory."""
        return Path(self.url.removeprefix("sqlite:///")) if self.url.startswith("sqlite:") else None


class ClockSection(Section):
    """How the sidecar treats a wall clock that is set while it runs."""

    settle_seconds: Seconds = SETTLE_SECONDS
    """Seconds for which a wall clock that jumped ahead by more than a minute must run steadily before
    decisions use it. Until then gated requests are refused with 503, unless `scopegate store accept-clock`
    accepts the time at once. At the start any time is accepted that is not before the last record of the
    log."""


class ScopeDefaultsSection(Section):
    """The terms of a scope if the request does not name them. They must not exceed the limits."""

    max_attempts: Annotated[Count, LIVE] = 1
    """Executions that a scope admits if the request does not say."""
    ttl_seconds: Annotated[Lifetime, LIVE] = 300
    """Seconds from issue to expiry if the request does not say."""
    # The value is in micro-dollars; the file gives dollars.
    max_cost: Annotated[Dollars, LIVE] = Field(500_000, alias="max_cost_usd")
    """US dollars that all executions of a scope may cost together if the request does not say, with at most
    six digits after the point. A scope for an action that holds more is refused unless the request says
    more."""


class ScopeLimitsSection(Section):
    """The most that a request over HTTP may ask for. Policies can only narrow this."""

    max_attempts: Annotated[Count, LIVE] = 10
    """The most executions that a request over HTTP may ask for; a request for more gets 422. Each one is
    another chance to make an outage worse."""
    ttl_seconds: Annotated[Lifetime, LIVE] = 3600
    """The longest time that a request over HTTP may ask for, in seconds; a request for more gets 422. A scope
    that outlives its incident is a standing permission."""
    max_cost: Annotated[Dollars, LIVE] = Field(100_000_000, alias="max_cost_usd")
    """The most US dollars that a request over HTTP may ask for; a request for more gets 422. No scope can be
    granted for an action that holds more; `scopegate check` warns of such an action."""


class ScopesSection(Section):
    """The terms of execution scopes."""

    serve_on: Literal["data", "admin"] = "data"
    """The listener that issues, lists and revokes scopes: `data` or `admin`. `admin` keeps issuing away from
    clients."""
    defaults: ScopeDefaultsSection
    limits: ScopeLimitsSection

    @model_validator(mode="after")
    def _defaults_within_limits(self) -> ScopesSection:
        cases: list[tuple[object, KeyPath, str]] = []
        for name, field in ScopeDefaultsSection.model_fields.items():
            key = field.alias or name
            over = getattr(self.defaults, name) > getattr(self.limits, name)
            above = f"is above scopes.limits.{key}; lower it, or raise the limit"
            below = f"is below scopes.defaults.{key}; lower that one, too"
            # Name the key that was given explicitly, because only such a key has a place.
            given = name in self.defaults.model_fields_set
            cases.append((over, ("defaults", key), above) if given else (over, ("limits", key), below))
        refuse(*cases)
        return self


class LogSection(Section):
    """The decision log, which is always hash-linked. These keys sign it, and keep values out of it."""

    signing_key_file: SigningKeyFile = None
    """The Ed25519 key that signs checkpoints, made by `scopegate log keygen FILE`. Its mode is 0600, or 0440
    if root owns it, as in a mounted Secret. It requires `checkpoint_file`. `null`: no checkpoints, so records
    that are cut off the end of the log are not noticed. See [The decision log](log.md)."""
    checkpoint_file: File = None
    """The file to which signed checkpoints are appended. Keep it on another disk than the store, or copy it
    away. It requires `signing_key_file`."""
    mask: Annotated[tuple[MaskPointer, ...], LIST] = ()
    """JSON pointers whose values are masked before a record is written, for example
    `/decision_inputs/parameters/customer`: below `/decision_inputs` and `/details`, and `/decision_reason`.
    Masked values cannot be restored."""
    mask_key_file: MaskKeyFile = None
    """A key of 16 bytes or more, as `openssl rand -hex 32` prints one, with a mode as above. Equal values
    then get equal masks. `null`: all masks are the same."""

    @model_validator(mode="after")
    def _what_belongs_together(self) -> LogSection:
        key, file = self.signing_key_file, self.checkpoint_file
        keys = (key, self.mask_key_file)
        without = "has no effect without log.{}; set both"
        refuse(
            (key and not file, ("signing_key_file",), without.format("checkpoint_file")),
            (file and not key, ("checkpoint_file",), without.format("signing_key_file")),
            (file and file in keys, ("checkpoint_file",), "is the file of a key, too; name another one"),
            (
                self.mask_key_file and not self.mask,
                ("mask_key_file",),
                "has no effect without log.mask; set what is masked there",
            ),
        )
        return self

    def masking(self) -> Mask | None:
        """What is masked before it is stored. Raises KeyFileUnusable if its key is gone."""
        if not self.mask:
            return None
        key = None if self.mask_key_file is None else keyfiles.mask_key(self.mask_key_file)
        return Mask(pointers=tuple(map(pointer, self.mask)), key=key)


class TelemetrySection(Section):
    """Logs and traces of requests, beside the decision records. Metrics are always on the ops listener."""

    access_log: Annotated[Literal["all", "gated", "none"], LIVE] = "all"
    """The log lines for requests on the data listener: `all`, `gated` (without pass-through) or `none`."""
    otlp_endpoint: Annotated[CollectorUrl, SECRET] = None
    """The collector for spans by OTLP over HTTP, for example `http://127.0.0.1:4318/v1/traces`. It needs the
    `[otel]` extra; the `OTEL_` variables configure the rest. `null`: no spans."""


class CareSection(Section):
    """The decisions of the routing optimizer, which come through the library and the admin listener."""

    min_confidence: Annotated[Fraction, LIVE] = 0.5
    """An optimization with a lower confidence (0 to 1) is not recorded as a decision."""


class ShutdownSection(Section):
    """How the sidecar stops after SIGTERM."""

    drain_seconds: Annotated[Grace, LIVE] = 25.0
    """Seconds for requests in flight to end. The rest are settled as `unknown`. Keep it below the grace
    period of the platform (30 seconds in Kubernetes)."""


class Settings(Section):
    """All keys of the configuration. `load` and `default` make it, and put in every section."""

    data: DataSection
    admin: AdminSection
    ops: OpsSection
    auth: AuthSection
    upstream: UpstreamSection
    store: StoreSection
    clock: ClockSection
    gate: GateSection
    scopes: ScopesSection
    log: LogSection
    telemetry: TelemetrySection
    care: CareSection
    shutdown: ShutdownSection
    policies: Annotated[Folder, LIVE] = Field("../policies/", validate_default=True)
    """The folder of policy files, relative to the configuration file. The sidecar does not start without a
    valid set in it. See [Policies](../../policies/README.md)."""

    @model_validator(mode="after")
    def _each_address_once(self) -> Settings:
        """Two listeners cannot share an address, and an upstream that is the sidecar itself never ends."""
        taken: dict[Address, str] = {}
        twice: list[tuple[object, KeyPath, str]] = []
        addresses: tuple[tuple[str, str, Section, Address], ...] = (
            ("data", "listen", self.data, self.data.listen),
            ("admin", "listen", self.admin, self.admin.listen),
            ("ops", "listen", self.ops, self.ops.listen),
            ("upstream", "url", self.upstream, self.upstream.address),
        )
        # Of two equal addresses, name the one given explicitly, because only such a key has a place.
        for name, key, _, address in sorted(addresses, key=lambda one: one[1] in one[2].model_fields_set):
            if address in taken:
                twice.append((True, (name, key), f"is the address of {taken[address]}, too; use another one"))
            elif address.is_certain():
                taken[address] = f"{name}.{key}"
        refuse(*twice)
        return self

    @cached_property
    def completion_base(self) -> str:
        """The URL of the data listener for a backend that reports, without a slash at its end."""
        scheme = "http" if self.data.tls.certificate_file is None else "https"
        return self.gate.completion_base_url or f"{scheme}://{self.data.listen}"

    @model_validator(mode="after")
    def _what_is_judged_reaches_the_backend(self) -> Settings:
        """A credential in the place of a header with a fact would show the backend another fact."""
        judged = {
            read_as(name): f"gate.routes[{index}]"
            for index, route in enumerate(self.gate.routes)
            for name in route.sources.header_names
        }
        judged["idempotency-key"] = "Idempotency-Key"
        if self.gate.tenant_header is not None:
            judged[read_as(self.gate.tenant_header)] = "gate.tenant_header"
        refuse(
            *(
                (
                    "gated" in each.on and read_as(each.header) in judged,
                    ("upstream", "credentials", number, "header"),
                    f"is read by {judged.get(read_as(each.header))} to judge a request; name another header",
                )
                for number, each in enumerate(self.upstream.credentials)
            )
        )
        return self

    @model_validator(mode="after")
    def _reports_arrive(self) -> Settings:
        """A backend that cannot report would leave each of its executions `unknown`."""
        base, listen = self.gate.completion_base_url, self.data.listen
        reported = [index for index, route in enumerate(self.gate.routes) if route.completion == "report"]
        if not reported:
            return self
        key: KeyPath = ("gate", "completion_base_url")
        if base is None:
            key = ("gate", "routes", reported[0], "completion")
            callable_as_it_stands = isinstance(listen, Listen) and listen.is_callable()
            message = (
                f"needs gate.completion_base_url, since data.listen ({listen}) cannot be called as it is; "
                "set it to the URL under which the backend reaches that listener"
            )
            refuse((not callable_as_it_stands, key, message))
        host, names = Host.parse(self.completion_base.split("/")[2]), self.data.hosts
        if names is not None and host is not None:
            message = f"lets the backend report to {host.bare}, which data.allowed_hosts lacks; add it there"
            refuse((not answers_to(host, names), key, message))
        return self

    def hosts_of(self, listener: Literal["data", "admin"]) -> tuple[str, ...] | None:
        """The names besides loopback ones under which the calls of a listener answer; None: any.

        Without a list the admin listener answers under any name where no browser can be led to it under a
        name of an attacker: on a Unix socket, and beyond loopback by its certificate. A trusted proxy shows
        the browser a certificate of its own, so there only the list counts.
        """
        if listener == "data":
            return self.data.hosts
        listen, names = self.admin.listen, self.admin.allowed_hosts
        is_certified = not listen.is_loopback() and self.auth.proxy.header is None
        return None if not names and (isinstance(listen, SocketFile) or is_certified) else names

    @model_validator(mode="after")
    def _admin_beyond_loopback(self) -> Settings:
        """What an operator may do needs a proof of who asks, and a credential needs a secret line."""
        if self.admin.listen.is_loopback():
            return self
        refuse(
            (
                not self.auth.methods,
                ("admin", "listen"),
                "must be a loopback address, because no method of auth is configured; write 127.0.0.1:9901, "
                "or configure a method, such as auth.tokens.file, and admin.tls.certificate_file",
            ),
            (
                self.auth.methods and not self.admin.tls.certificate_file,
                ("admin", "listen"),
                "is beyond loopback, where credentials need TLS; set admin.tls.certificate_file, or write "
                "127.0.0.1:9901",
            ),
        )
        return self

    @model_validator(mode="after")
    def _certificates_are_asked_for(self) -> Settings:
        verified = self.data.tls.client_ca_file or self.admin.tls.client_ca_file
        message = (
            "needs a listener that verifies client certificates; set data.tls.client_ca_file or "
            "admin.tls.client_ca_file"
        )
        refuse((self.auth.mtls.id and not verified, ("auth", "mtls", "id"), message))
        return self

    @model_validator(mode="after")
    def _checkpoints_beside_the_store(self) -> Settings:
        file = self.log.checkpoint_file
        message = "is the file of store.url, too; name another one"
        refuse((file and file == self.store.file, ("log", "checkpoint_file"), message))
        return self


# Every key that holds a value, by its dotted name.
KEYS: Mapping[str, Key] = {key.name: key for key in keys(Settings) if not key.section}

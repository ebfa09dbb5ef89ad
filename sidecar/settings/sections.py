"""The sections of the configuration, key by key as they stand in the file.

What one value may be stands in `values`. What only a section as a whole can see is checked here, such as
what the files of a `tls` section must hold together. The text below a key is what the reference and editors
show.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from sidecar.clock import SETTLE_SECONDS
from sidecar.core.facts import DEFAULT_SOURCES, FactSources
from sidecar.core.masking import Mask, pointer
from sidecar.core.policy import RiskClass
from sidecar.files import keyfiles, tls
from sidecar.files.yamlfile import KeyPath
from sidecar.settings.addresses import Address, Listen, SocketFile
from sidecar.settings.keys import Below, Section
from sidecar.settings.values import (
    AllowedHost,
    AnswerPlace,
    BodyPlace,
    Bytes,
    CollectorUrl,
    Count,
    Dollars,
    File,
    Folder,
    Fraction,
    Grace,
    HeaderName,
    HostName,
    Lifetime,
    ListenAddress,
    MaskKeyFile,
    MaskPointer,
    OwnAddress,
    Pattern,
    Place,
    Places,
    Risk,
    Seconds,
    SigningKeyFile,
    StoreUrl,
    UpstreamUrl,
    some,
)


class ListenTls(Section):
    """TLS on a listener: off without a certificate."""

    certificate_file: File = None
    """a certificate in PEM, with those between it and its authority; with it the listener speaks TLS"""
    key_file: File = None
    """its key, without a passphrase"""
    client_ca_file: File = None
    """who signs clients' certificates; then a client needs one"""

    @model_validator(mode="after")
    def _what_belongs_together(self, info: ValidationInfo) -> ListenTls:
        wrong = _half_a_pair(self.certificate_file, self.key_file)
        if self.client_ca_file is not None and self.certificate_file is None:
            message = "asks nobody for a certificate without certificate_file; give both"
            wrong.append((("client_ca_file",), message))
        if wrong:
            raise Below(wrong)
        if self.certificate_file is not None:
            _try(lambda: tls.server_context(**self.files()), info)
        return self

    def files(self) -> dict[str, Any]:
        """As `tls.server_context` takes them."""
        return {name: getattr(self, name) for name in ListenTls.model_fields}


class UpstreamTls(Section):
    """TLS towards the backend, which an https:// url switches on."""

    ca_file: File = None
    """who signs the certificate of an https backend; `null`: whom this system trusts"""
    certificate_file: File = None
    """the certificate that is shown to it"""
    key_file: File = None
    """its key, without a passphrase"""
    server_name: HostName = None
    """the name in its certificate, where that is not the host of the url"""

    @model_validator(mode="after")
    def _what_belongs_together(self, info: ValidationInfo) -> UpstreamTls:
        wrong = _half_a_pair(self.certificate_file, self.key_file)
        if wrong:
            raise Below(wrong)
        if any(self.files().values()):
            _try(lambda: tls.client_context(**self.files()), info)
        return self

    def files(self) -> dict[str, Any]:
        """As `tls.client_context` takes them."""
        return {name: getattr(self, name) for name in ("ca_file", "certificate_file", "key_file")}


def _half_a_pair(certificate: Path | None, key: Path | None) -> list[tuple[KeyPath, str]]:
    if certificate is not None and key is None:
        return [(("certificate_file",), "needs key_file, too; name the key that it was made for")]
    if key is not None and certificate is None:
        return [(("key_file",), "does nothing without certificate_file; give both")]
    return []


def _try(make: Callable[[], object], info: ValidationInfo) -> None:
    """Whether TLS can use the files, unless the context says that keys are not read."""
    if (info.context or {}).get("read_keys", True):
        try:
            make()
        except tls.TlsFileUnusable as exc:
            raise Below([((exc.key,), exc.reason)]) from exc


class Data(Section):
    """What clients talk to: the proxy, and the calls that issue, list and revoke scopes."""

    listen: ListenAddress = Listen("127.0.0.1", 8000)
    """where clients talk to the gate: host:port, or `unix:/path`; port 0 is any free port"""
    allowed_hosts: Annotated[tuple[AllowedHost, ...] | None, Field(strict=False)] = None
    """under which names, besides loopback ones, scopes are issued, listed and revoked: names without a port;
    else 421. `null`: loopback names where it listens on loopback, any name where it does not"""
    tls: ListenTls

    @property
    def hosts(self) -> tuple[str, ...] | None:
        """The names besides loopback ones under which the calls of the sidecar itself answer; None: any."""
        listens_on_loopback = isinstance(self.listen, Listen) and self.listen.is_loopback()
        return () if self.allowed_hosts is None and listens_on_loopback else self.allowed_hosts


class Admin(Section):
    """What operators talk to: decisions, open executions, reconciling, reload."""

    listen: OwnAddress = Listen("127.0.0.1", 9901)
    """decisions, executions, reconciling; loopback or a Unix socket only, since it asks for no
    authentication"""
    allowed_hosts: Annotated[tuple[AllowedHost, ...], Field(strict=False)] = ()
    """under which names, besides loopback ones, it answers: names without a port; else 421. See Hosts
    and browsers"""
    tls: ListenTls

    @property
    def hosts(self) -> tuple[str, ...] | None:
        """The names besides loopback ones under which it answers; None: any, as on a Unix socket."""
        return None if isinstance(self.listen, SocketFile) and not self.allowed_hosts else self.allowed_hosts


class Ops(Section):
    """What the platform talks to: /health/live, /health/ready and /metrics, nothing else."""

    listen: ListenAddress = Listen("127.0.0.1", 9902)
    """readiness and metrics"""
    tls: ListenTls


class Upstream(Section):
    """The backend that executes recovery actions. Everything that is not gated goes there untouched."""

    url: UpstreamUrl
    """the backend: `http://host:port`, `https://host:port`, or `unix:/path` for HTTP over a Unix socket. The
    one key that must be set"""
    connect_timeout_seconds: Seconds = 2.0
    """to establish a connection; nothing was sent yet, so the attempt returns"""
    response_timeout_seconds: Seconds = 30.0
    """until a gated answer is complete, or a pass-through one has begun"""
    reuse_idle_seconds: Grace = 1.0
    """how long an idle connection may be used again; keep it below the backend's own keep-alive"""
    max_connections: Count = 512
    """connections to the backend; pass-through may hold three quarters of them, the rest are kept for the
    gate"""
    tls: UpstreamTls

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
    def _tls_where_it_is_spoken(self) -> Upstream:
        idle = [name for name in UpstreamTls.model_fields if getattr(self.tls, name) is not None]
        if idle and not self.url.startswith("https:"):
            message = "does nothing without https; write url: https://host:port, or remove this key"
            raise Below([(("tls", name), message) for name in idle])
        return self


class Store(Section):
    """Where scopes, attempts and the decision log are kept. Without it nothing gated goes through."""

    url: StoreUrl = Field("sqlite:///var/scopegate.db", validate_default=True)
    """three slashes: relative to the file, four: absolute. One sidecar a file. `memory://` is for tests"""
    deadline_seconds: Seconds = 2.0
    """for a decision to be on disk; past it 503, and nothing is forwarded"""

    @property
    def file(self) -> Path | None:
        """The database file, absolute; None for a store in memory."""
        return Path(self.url.removeprefix("sqlite:///")) if self.url.startswith("sqlite:") else None


class Clock(Section):
    """When a wall clock is believed that was set while the sidecar ran."""

    settle_seconds: Seconds = SETTLE_SECONDS
    """how long a wall clock that jumped ahead by more than a minute must be stable before it is believed;
    until then 503"""


class Route(Section):
    """One path that is gated, and where its facts stand."""

    path: Pattern
    """`**/x`: any path that ends in `/x`; anything else: exactly that path; `{name}`: one segment"""
    mode: Literal["enforce", "shadow"] = "enforce"
    """`shadow` refuses nothing and records what it would refuse; see Policies"""
    scope_id: Place = DEFAULT_SOURCES.scope_id
    """the place of the scope that is spent"""
    incident_id: Place = DEFAULT_SOURCES.incident_id
    """the place of the incident; it must be the scope's"""
    action: Place = DEFAULT_SOURCES.action
    """the place of the action"""
    parameters: BodyPlace = DEFAULT_SOURCES.parameters
    """the place of the action's parameters, a JSON object in the body"""
    target_agents: Places = DEFAULT_SOURCES.target_agents
    """one place or several; those that hold a value must agree"""
    cost: AnswerPlace = DEFAULT_SOURCES.cost
    """the place of the cost in the backend's answer: a header, or a JSON pointer"""

    @cached_property
    def sources(self) -> FactSources:
        """Where this route's facts stand, as the core wants it."""
        return FactSources(
            scope_id=self.scope_id,
            incident_id=self.incident_id,
            action=self.action,
            parameters=self.parameters,
            target_agents=self.target_agents,
            cost=self.cost,
        )


class Gate(Section):
    """Which requests need a scope, and how they are read."""

    routes: Annotated[tuple[Route, ...], Field(strict=False), BeforeValidator(some)] = Field(
        [{"path": "**/recovery/execute"}], validate_default=True, json_schema_extra={"minItems": 1}
    )
    """what is gated; see Routes"""
    max_body_bytes: Bytes = 1_048_576
    """of a gated request; past it 413"""
    max_answer_bytes: Bytes = 1_048_576
    """of a gated answer held back until it is settled; a longer one streams"""
    head_timeout_seconds: Seconds = 10.0
    """for a request head to arrive, on any path; past it the connection is closed"""
    body_timeout_seconds: Seconds = 10.0
    """for a gated body to arrive; past it 408"""
    max_in_flight: Count = 1024
    """gated requests at once, from the first byte of the body on; past it 503 `overloaded`"""
    annotate_response: bool = False
    """`true` adds scope_id, attempt_number, scope_status, attempts_remaining, cost_used_usd, executed_at to
    JSON answers that lack them"""
    tenant_header: HeaderName = None
    """the header that names the tenant; only where a proxy in front controls it. `null`: all is tenant
    `default`"""
    scope_required_from: Risk = RiskClass.LOW
    """the lowest risk that needs a scope: `low` (everything), `medium`, `high` or `critical`; see Policies"""

    @model_validator(mode="after")
    def _each_path_once(self) -> Gate:
        paths = [(route.path.anywhere, route.path.folded) for route in self.routes]
        message = "is the path of a route above, too; keep one of them"
        again = [index for index, path in enumerate(paths) if path in paths[:index]]
        if again:
            raise Below([(("routes", index, "path"), message) for index in again])
        return self


class ScopeDefaults(Section):
    """What a scope gets where the request for it does not say. Never above the limits."""

    max_attempts: Count = 1
    """what a scope gets where the request does not say"""
    ttl_seconds: Lifetime = 300
    """what a scope gets where the request does not say"""
    # The value is in micro-dollars; the file gives dollars.
    max_cost: Dollars = Field(500_000, alias="max_cost_usd")
    """what a scope gets where the request does not say; at most six digits after the point"""


class ScopeLimits(Section):
    """The most that a request over HTTP may ask for."""

    max_attempts: Count = 10
    """the most that may be asked for over HTTP; past it 422"""
    ttl_seconds: Lifetime = 3600
    """the most that may be asked for over HTTP; past it 422"""
    max_cost: Dollars = Field(100_000_000, alias="max_cost_usd")
    """the most that may be asked for over HTTP; past it 422"""


class Scopes(Section):
    """What an execution scope may grant."""

    serve_on: Literal["data", "admin"] = "data"
    """the listener that issues, lists and revokes scopes: `data` or `admin`"""
    defaults: ScopeDefaults
    limits: ScopeLimits

    @model_validator(mode="after")
    def _defaults_within_limits(self) -> Scopes:
        over: list[tuple[KeyPath, str]] = []
        for name, field in ScopeDefaults.model_fields.items():
            key = field.alias or name
            if getattr(self.defaults, name) <= getattr(self.limits, name):
                continue
            # Name the key that was given explicitly, because only such a key has a place.
            if name in self.defaults.model_fields_set:
                over.append(
                    (("defaults", key), f"is above scopes.limits.{key}; lower it, or raise the limit")
                )
            else:
                over.append((("limits", key), f"is below scopes.defaults.{key}; lower that one, too"))
        if over:
            raise Below(over)
        return self


class Log(Section):
    """The decision log: signing it, and keeping things out of it."""

    signing_key_file: SigningKeyFile = None
    """the Ed25519 key that signs checkpoints, mode 0600 (0440 where root owns it); `scopegate log keygen`
    makes one. See The decision log"""
    checkpoint_file: File = None
    """where signed checkpoints go, best on another disk than the store; together with the key or not at
    all"""
    mask: Annotated[tuple[MaskPointer, ...], Field(strict=False)] = ()
    """what is masked before a record is written: JSON pointers below `/decision_inputs` or `/details`, or
    `/decision_reason`"""
    mask_key_file: MaskKeyFile = None
    """16 bytes or more, mode as before: then equal values get equal masks"""

    @model_validator(mode="after")
    def _what_belongs_together(self) -> Log:
        wrong: list[tuple[KeyPath, str]] = []
        if self.checkpoint_file is None and self.signing_key_file is not None:
            wrong.append((("signing_key_file",), "signs nothing without log.checkpoint_file; give both"))
        if self.checkpoint_file is not None and self.signing_key_file is None:
            wrong.append((("checkpoint_file",), "stays empty without log.signing_key_file; give both"))
        if self.checkpoint_file is not None and self.checkpoint_file in (
            self.signing_key_file,
            self.mask_key_file,
        ):
            wrong.append((("checkpoint_file",), "names a file that holds a key; name another one"))
        if self.mask_key_file is not None and not self.mask:
            wrong.append((("mask_key_file",), "does nothing without log.mask; say there what is masked"))
        if wrong:
            raise Below(wrong)
        return self

    def masking(self) -> Mask | None:
        """What is masked before it is stored. Raises KeyFileUnusable if its key is gone."""
        if not self.mask:
            return None
        key = None if self.mask_key_file is None else keyfiles.mask_key(self.mask_key_file)
        return Mask(pointers=tuple(map(pointer, self.mask)), key=key)


class Telemetry(Section):
    """What is told of each request, beside the records."""

    access_log: Literal["all", "gated", "none"] = "all"
    """a log line for each request on the data listener: `all`, `gated` or `none`"""
    otlp_endpoint: CollectorUrl = None
    """where spans are sent by OTLP over HTTP; needs the `[otel]` extra"""


class Care(Section):
    """The routing optimizer's decisions."""

    min_confidence: Fraction = 0.5
    """below this confidence a routing optimization is not recorded as a decision"""


class Shutdown(Section):
    """What happens on SIGTERM."""

    drain_seconds: Grace = 25.0
    """for requests in flight to end after SIGTERM; keep it below the platform's grace period"""


class Settings(Section):
    """Everything that can be configured. Made by `load` and `default`, which put in every section."""

    data: Data
    admin: Admin
    ops: Ops
    upstream: Upstream
    store: Store
    clock: Clock
    gate: Gate
    scopes: Scopes
    log: Log
    telemetry: Telemetry
    care: Care
    shutdown: Shutdown
    policies: Folder = Field("../policies/", validate_default=True)
    """the folder of policy files; without a valid set in it nothing starts"""

    @model_validator(mode="after")
    def _each_address_once(self) -> Settings:
        """Two listeners cannot share an address, and an upstream that is the sidecar itself never ends."""
        taken: dict[Address, str] = {}
        twice: list[tuple[KeyPath, str]] = []
        addresses: tuple[tuple[str, str, Section, Address], ...] = (
            ("data", "listen", self.data, self.data.listen),
            ("admin", "listen", self.admin, self.admin.listen),
            ("ops", "listen", self.ops, self.ops.listen),
            ("upstream", "url", self.upstream, self.upstream.address),
        )
        # Of two equal addresses, name the one given explicitly, because only such a key has a place.
        for name, key, _, address in sorted(addresses, key=lambda one: one[1] in one[2].model_fields_set):
            if address in taken:
                twice.append(((name, key), f"is the address of {taken[address]}, too; use another one"))
            elif address.is_certain():
                taken[address] = f"{name}.{key}"
        if twice:
            raise Below(twice)
        return self

    @model_validator(mode="after")
    def _checkpoints_beside_the_store(self) -> Settings:
        if self.log.checkpoint_file is not None and self.log.checkpoint_file == self.store.file:
            raise Below([(("log", "checkpoint_file"), "is the file of store.url, too; name another one")])
        return self

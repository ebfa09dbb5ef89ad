"""Configuration: flag over environment over file. Every mistake is named with its place, all at once.

Pydantic stands here because text comes in here; its errors become plain sentences before anybody sees them.
The sections below are the file's, key by key; what a value may be stands in configvalues.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from sidecar import keyfiles
from sidecar.configkeys import Below, Section, complete, keys_of, put, section_of, typed
from sidecar.configvalues import (
    Address,
    AnswerPlace,
    BodyPlace,
    Bytes,
    Count,
    Dollars,
    File,
    Folder,
    Fraction,
    Grace,
    HeaderName,
    Lifetime,
    Listen,
    LoopbackAddress,
    MaskKeyFile,
    MaskPointer,
    Pattern,
    Place,
    Places,
    Risk,
    Seconds,
    SigningKeyFile,
    StoreUrl,
    UpstreamUrl,
    sentence,
    some,
)
from sidecar.core.facts import DEFAULT_SOURCES, FactSources
from sidecar.core.masking import Mask, pointer
from sidecar.core.policy import RiskClass
from sidecar.errors import ConfigurationError, Fault
from sidecar.yamlfile import Document, KeyPath, contents, did_you_mean, dotted, in_order, shown, survey

__all__ = ["Listen", "Loaded", "Route", "Settings", "default", "load"]

PREFIX = "SCOPEGATE_"


class Data(Section):
    listen: Address = Listen("127.0.0.1", 8000)


class Admin(Section):
    listen: LoopbackAddress = Listen("127.0.0.1", 9901)


class Ops(Section):
    listen: Address = Listen("127.0.0.1", 9902)


class Upstream(Section):
    url: UpstreamUrl
    connect_timeout_seconds: Seconds = 2.0
    response_timeout_seconds: Seconds = 30.0
    reuse_idle_seconds: Grace = 1.0
    max_connections: Count = 512

    @property
    def address(self) -> Listen:
        """The backend's host and port."""
        return Listen.parse(self.url.removeprefix("http://"))


class Store(Section):
    url: StoreUrl = Field("sqlite:///var/scopegate.db", validate_default=True)
    deadline_seconds: Seconds = 2.0

    @property
    def file(self) -> Path | None:
        """The database file, absolute; None for a store in memory."""
        return Path(self.url.removeprefix("sqlite:///")) if self.url.startswith("sqlite:") else None


class Route(Section):
    path: Pattern
    mode: Literal["enforce", "shadow"] = "enforce"
    scope_id: Place = DEFAULT_SOURCES.scope_id
    incident_id: Place = DEFAULT_SOURCES.incident_id
    action: Place = DEFAULT_SOURCES.action
    parameters: BodyPlace = DEFAULT_SOURCES.parameters
    target_agents: Places = DEFAULT_SOURCES.target_agents
    cost: AnswerPlace = DEFAULT_SOURCES.cost

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
    routes: Annotated[tuple[Route, ...], Field(strict=False), BeforeValidator(some)] = Field(
        [{"path": "**/recovery/execute"}], validate_default=True
    )
    max_body_bytes: Bytes = 1_048_576
    max_answer_bytes: Bytes = 1_048_576
    head_timeout_seconds: Seconds = 10.0
    body_timeout_seconds: Seconds = 10.0
    max_in_flight: Count = 1024
    annotate_response: bool = False
    tenant_header: HeaderName = None
    scope_required_from: Risk = RiskClass.LOW

    @model_validator(mode="after")
    def _each_path_once(self) -> Gate:
        paths = [(route.path.anywhere, route.path.folded) for route in self.routes]
        message = "is the path of a route above, too; keep one of them"
        again = [index for index, path in enumerate(paths) if path in paths[:index]]
        if again:
            raise Below([(("routes", index, "path"), message) for index in again])
        return self


class ScopeDefaults(Section):
    """`max_cost` is in micro-dollars; in the file it is `max_cost_usd`, in dollars."""

    max_attempts: Count = 1
    ttl_seconds: Lifetime = 300
    max_cost: Dollars = Field(500_000, alias="max_cost_usd")


class ScopeLimits(Section):
    """As ScopeDefaults."""

    max_attempts: Count = 10
    ttl_seconds: Lifetime = 3600
    max_cost: Dollars = Field(100_000_000, alias="max_cost_usd")


class Scopes(Section):
    serve_on: Literal["data", "admin"] = "data"
    defaults: ScopeDefaults
    limits: ScopeLimits

    @model_validator(mode="after")
    def _defaults_within_limits(self) -> Scopes:
        over: list[tuple[KeyPath, str]] = []
        for name, field in ScopeDefaults.model_fields.items():
            key = field.alias or name
            if getattr(self.defaults, name) <= getattr(self.limits, name):
                continue
            # Of the two, the one that somebody wrote is the one to name: it has a place.
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
    signing_key_file: SigningKeyFile = None
    checkpoint_file: File = None
    mask: Annotated[tuple[MaskPointer, ...], Field(strict=False)] = ()
    mask_key_file: MaskKeyFile = None

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


class Care(Section):
    min_confidence: Fraction = 0.5


class Shutdown(Section):
    drain_seconds: Grace = 25.0


class Settings(Section):
    """Everything that can be configured. Made by `load` and `default`, which put in every section."""

    data: Data
    admin: Admin
    ops: Ops
    upstream: Upstream
    store: Store
    gate: Gate
    scopes: Scopes
    log: Log
    care: Care
    shutdown: Shutdown
    policies: Folder = Field("../policies/", validate_default=True)

    @model_validator(mode="after")
    def _each_address_once(self) -> Settings:
        """Two listeners cannot share an address, and an upstream that is the sidecar itself never ends."""
        taken: dict[Listen, str] = {}
        twice: list[tuple[KeyPath, str]] = []
        addresses: tuple[tuple[str, str, Section, Listen], ...] = (
            ("data", "listen", self.data, self.data.listen),
            ("admin", "listen", self.admin, self.admin.listen),
            ("ops", "listen", self.ops, self.ops.listen),
            ("upstream", "url", self.upstream, self.upstream.address),
        )
        # Of two, the one that somebody wrote is the one to name: it has a place.
        for name, key, _, address in sorted(addresses, key=lambda one: one[1] in one[2].model_fields_set):
            if address in taken:
                twice.append(((name, key), f"is the address of {taken[address]}, too; use another one"))
            elif address.port:
                taken[address] = f"{name}.{key}"
        if twice:
            raise Below(twice)
        return self

    @model_validator(mode="after")
    def _checkpoints_beside_the_store(self) -> Settings:
        if self.log.checkpoint_file is not None and self.log.checkpoint_file == self.store.file:
            raise Below([(("log", "checkpoint_file"), "is the file of store.url, too; name another one")])
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Settings that are valid, and what else there is to say: warnings about the environment, the keys of the
    file that the environment or a flag overrides, and the file itself, which knows where its keys stand."""

    settings: Settings
    warnings: tuple[str, ...]
    shadowed: tuple[str, ...]
    document: Document


def load(
    path: Path,
    *,
    environment: Mapping[str, str],
    overrides: Sequence[tuple[str, str]] = (),
    read_keys: bool = True,
) -> Loaded:
    """The settings. Raises ConfigurationError.

    `overrides` are (dotted key, text) from flags. File names in values are relative to the file's folder,
    wherever they were given. Without `read_keys` the key files are not looked into: whoever only reads the
    log need not have what it is written with.
    """
    document, faults = survey(contents(path), str(path), environment=environment)
    keys = {dotted(key): field for key, field in keys_of(Settings)}
    warnings: list[str] = []
    given: list[tuple[str, str, str]] = []
    for variable in sorted(environment):
        if variable.startswith(PREFIX):
            key = variable.removeprefix(PREFIX).lower().replace("__", ".")
            if key in keys and not section_of(keys[key]) and variable == _variable(key):
                given.append((f"environment {variable}", key, environment[variable]))
            else:
                warnings.append(_unknown_variable(variable, keys))
    given += [(f"--set {shown(key)}", key, text) for key, text in overrides]
    found = list(faults)
    tree: Any = {} if document is None or document.value is None else document.value
    places: dict[KeyPath, str] = {}
    for place, key, text in given:
        field = keys.get(key)
        if field is None:
            near = did_you_mean(key, [name for name, field in keys.items() if not section_of(field)])
            found.append(Fault(place, shown(key), f"is not a known key{near}"))
        elif section_of(field):
            found.append(Fault(place, key, "is a section; name one of its keys"))
        else:
            try:
                put(tree, tuple(key.split(".")), typed(field, text, place))
                places[tuple(key.split("."))] = place
            except ConfigurationError as exc:
                found += [Fault(place, key + fault.key, fault.message) for fault in exc.faults]
    if document is None:
        raise ConfigurationError(in_order(found))
    context = {"folder": Path(os.path.abspath(path)).parent, "read_keys": read_keys}
    settings, wrong = _validated(tree, context, document, places)
    if settings is None or found:
        raise ConfigurationError(in_order([*found, *wrong]))
    overridden = {key for _, key, _ in given}
    return Loaded(
        settings=settings,
        warnings=tuple(warnings),
        shadowed=tuple(key for key in keys if key in overridden and tuple(key.split(".")) in document.marks),
        document=document,
    )


def default(upstream_url: str, **sections: Any) -> Settings:
    """Settings without a file, for the demo and for tests: `default(url, store={"url": "memory://"})`."""
    tree = {**sections, "upstream": {"url": upstream_url, **sections.get("upstream", {})}}
    settings, wrong = _validated(tree, {"folder": Path.cwd()}, Document("settings", tree), {})
    if settings is None:
        raise ConfigurationError(wrong)
    return settings


def _validated(
    tree: Any, context: dict[str, Any], document: Document, places: Mapping[KeyPath, str]
) -> tuple[Settings | None, list[Fault]]:
    try:
        return Settings.model_validate(complete(tree, Settings), context=context), []
    except ValidationError as exc:
        errors = exc.errors(include_url=False)
    faults: list[Fault] = []
    for error in errors:
        cause = error.get("ctx", {}).get("error")
        unknown = error["type"] == "extra_forbidden"
        message = f"is not a known key{_nearest(error['loc'])}" if unknown else sentence(dict(error))
        below = cause.found if isinstance(cause, Below) else [((), message)]
        for rest, message in below:
            path = (*error["loc"], *rest)
            above = [places[path[:length]] for length in range(len(path), 0, -1) if path[:length] in places]
            if above or not document.is_broken(path):
                place = above[0] if above else document.place(path)
                faults.append(Fault(place, dotted(path), message))
    return None, faults


def _variable(key: str) -> str:
    return PREFIX + key.upper().replace(".", "__")


def _unknown_variable(variable: str, keys: Mapping[str, FieldInfo]) -> str:
    variables = {_variable(key): key for key, field in keys.items() if not section_of(field)}
    near = difflib.get_close_matches(variable, variables, n=1, cutoff=0.0)[0]
    return f"environment {variable}: no key has this name, ignored; the nearest is {variables[near]} ({near})"


def _nearest(path: KeyPath) -> str:
    """What an unknown key was meant to be: a key of its section, else one of that name elsewhere."""
    model: type[Section] = Route if path[:2] == ("gate", "routes") else Settings
    for step in path[:-1] if model is Settings else ():
        model = section_of(model.model_fields[str(step)]) or model
    word = str(path[-1])
    near = did_you_mean(word, [field.alias or name for name, field in model.model_fields.items()])
    elsewhere = [dotted(key) for key, _ in keys_of(Settings) if key[-1] == word and len(key) > 1]
    return near or (f'; did you mean "{elsewhere[0]}"?' if elsewhere else "")

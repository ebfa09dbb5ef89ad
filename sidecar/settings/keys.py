"""The keys of the configuration as a tree of sections, and how text from outside gets to its place there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import NoneType
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from sidecar.files.faults import ConfigurationError, Fault
from sidecar.files.yamlfile import KeyPath, dotted, plain, survey

# A reload may change the keys in LIVE. The keys in AT_START need a restart, because open sockets,
# connections, files and threads were made from them. Every key is in exactly one of the two sets.
LIVE = frozenset(
    {
        "data.allowed_hosts",
        "admin.allowed_hosts",
        "upstream.response_timeout_seconds",
        "gate.routes",
        "gate.max_body_bytes",
        "gate.max_answer_bytes",
        "gate.body_timeout_seconds",
        "gate.max_in_flight",
        "gate.annotate_response",
        "gate.tenant_header",
        "gate.scope_required_from",
        "scopes.defaults.max_attempts",
        "scopes.defaults.ttl_seconds",
        "scopes.defaults.max_cost_usd",
        "scopes.limits.max_attempts",
        "scopes.limits.ttl_seconds",
        "scopes.limits.max_cost_usd",
        "telemetry.access_log",
        "care.min_confidence",
        "shutdown.drain_seconds",
        "policies",
    }
)
AT_START = frozenset(
    {
        "data.listen",
        "data.tls.certificate_file",
        "data.tls.key_file",
        "data.tls.client_ca_file",
        "admin.listen",
        "admin.tls.certificate_file",
        "admin.tls.key_file",
        "admin.tls.client_ca_file",
        "ops.listen",
        "ops.tls.certificate_file",
        "ops.tls.key_file",
        "ops.tls.client_ca_file",
        "upstream.url",
        "upstream.connect_timeout_seconds",
        "upstream.reuse_idle_seconds",
        "upstream.max_connections",
        "upstream.tls.ca_file",
        "upstream.tls.certificate_file",
        "upstream.tls.key_file",
        "upstream.tls.server_name",
        "store.url",
        "store.deadline_seconds",
        "clock.settle_seconds",
        "gate.head_timeout_seconds",
        "scopes.serve_on",
        "log.signing_key_file",
        "log.checkpoint_file",
        "log.mask",
        "log.mask_key_file",
        "telemetry.otlp_endpoint",
    }
)
# Values that no message repeats, because they may contain a password.
SECRET = frozenset({"store.url", "telemetry.otlp_endpoint"})


class Below(ValueError):
    """A mistake that only the section as a whole can see, said of the keys in it that are wrong."""

    def __init__(self, found: Sequence[tuple[KeyPath, str]]) -> None:
        super().__init__("holds values that contradict each other")
        self.found = found


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def complete(tree: Any, model: type[Section]) -> Any:
    """The tree with every section in it: one that is left out, or empty, is all defaults."""
    if not isinstance(tree, dict):
        return tree
    opened = dict(tree)
    for name, field in model.model_fields.items():
        inner = section_of(field)
        if inner:
            opened[name] = complete({} if opened.get(name) is None else opened[name], inner)
    return opened


def section_of(field: FieldInfo) -> type[Section] | None:
    kind_of = field.annotation
    return kind_of if isinstance(kind_of, type) and issubclass(kind_of, Section) else None


def keys_of(model: type[Section], above: KeyPath = ()) -> Iterator[tuple[KeyPath, FieldInfo]]:
    """Every key of the file down to lists, sections included."""
    for name, field in model.model_fields.items():
        path = (*above, field.alias or name)
        yield path, field
        inner = section_of(field)
        if inner:
            yield from keys_of(inner, path)


def values_of(section: Section) -> dict[str, Any]:
    """Every value by its dotted key, as the file would have it."""
    dumped = section.model_dump(mode="json", by_alias=True)
    values: dict[str, Any] = {}
    for path, field in keys_of(type(section)):
        if not section_of(field):
            value: Any = dumped
            for step in path:
                value = value[step]
            values[dotted(path)] = value
    return values


def differing(one: Section, other: Section) -> tuple[str, ...]:
    """The dotted keys in which two sections of a kind differ; a list differs as a whole."""
    others = values_of(other)
    return tuple(key for key, value in values_of(one).items() if value != others[key])


def typed(field: FieldInfo, text: str, place: str) -> Any:
    """Text of the environment or a flag, read as the key is: text as it is, else as YAML reads it."""
    wanted = field.annotation
    nothing = NoneType in get_args(wanted) and text in ("", "~", "null")
    if not nothing and any(get_origin(kind) is tuple for kind in (wanted, *get_args(wanted))):
        document, faults = survey(text, place)
        if document is None or faults:
            raise ConfigurationError(faults)
        return document.value
    if nothing or wanted in (int, float, bool, NoneType):
        try:
            return plain(text)
        except ValueError as exc:
            raise ConfigurationError([Fault(place, "", f"the value {exc}")]) from exc
    return text


def put(tree: Any, path: KeyPath, value: Any) -> None:
    """Sets a key; where the file has no map on the way there, its own fault is enough."""
    for step in path[:-1]:
        if not isinstance(tree, dict):
            return
        if tree.get(step) is None:
            tree[step] = {}
        tree = tree[step]
    if isinstance(tree, dict):
        tree[path[-1]] = value

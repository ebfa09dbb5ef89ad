"""The kinds of values in configuration and policies, one row each: check, schema, and text in the file.

Numbers are in `numbers`.

A check raises ValueError with one sentence that says what is wanted. The sentence never repeats the value,
which may be a secret. A value that cannot work is refused here, before anything starts.
"""

from __future__ import annotations

import importlib.util
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args
from urllib.parse import urlsplit

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    WrapValidator,
)

from sidecar.core import masking
from sidecar.core.bodies import FORM_TYPE, BodyKind, is_media_type
from sidecar.core.facts import IDENTIFIER_RULE, WHOLE_PATH, Source, is_identifier
from sidecar.core.headernames import ends_here
from sidecar.core.host import BRACKETED, NAME, Host
from sidecar.core.pattern import RoutePath, RoutePattern
from sidecar.core.policy import RiskClass
from sidecar.core.target import METHODS
from sidecar.files import keyfiles
from sidecar.files.keyfiles import KeyFileUnusable
from sidecar.settings import presets
from sidecar.settings.addresses import Address, Listen, SocketFile, endpoint
from sidecar.settings.faults import Contradiction, choices, kind, one_of

_DEFAULT_PORTS = {"http": 80, "https": 443}
_OTEL = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")
# The longest socket name that every kernel accepts: 107 bytes on Linux, 103 on macOS.
MAX_SOCKET_NAME_BYTES = 103


@dataclass(frozen=True, eq=False)
class Kind:
    """One kind of value, as metadata of a type: its check, its JSON Schema, and how a file writes it."""

    # By this attribute pydantic knows that the items stand for the object.
    __is_annotated_types_grouped_metadata__: ClassVar[Literal[True]] = True

    check: Callable[[object], object] | Callable[[object, ValidationInfo], object]
    schema: dict[str, Any]
    written: Callable[[Any], object] | None = None
    is_optional: bool = False

    def optional(self) -> Kind:
        """The same kind, or null."""
        kinds = self.schema["type"]
        schema = {**self.schema, "type": [*([kinds] if isinstance(kinds, str) else kinds), "null"]}
        return replace(self, schema=schema, is_optional=True)

    def __iter__(self) -> Iterator[object]:
        yield PlainValidator(self.check)
        if self.is_optional:
            yield WrapValidator(_unless_null)
        if self.written is not None:
            yield PlainSerializer(self.written)
        yield WithJsonSchema(self.schema)


def _unless_null(value: object, check: Callable[[object], object]) -> object:
    return None if value is None else check(value)


def _not_empty(value: object) -> object:
    """Refuse null and the empty list. Other values are checked by the type."""
    if value is None or value == []:
        raise ValueError("is empty; add a value, or remove the key")
    return value


def _as_list(value: object) -> object:
    """A single value counts as a list of it."""
    return value if isinstance(value, list) else [value]


NOT_EMPTY = BeforeValidator(_not_empty)
ONE_OR_MORE = BeforeValidator(_as_list)
# Pydantic takes lists for tuples.
LIST = Field(strict=False)


# Text ---------------------------------------------------------------------------------------------------

_HEADER = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_HOST = r"(\[[^\[\]]+\]|[A-Za-z0-9._-]+)"
_PORT = r":[0-9]{1,5}"
_SOCKET = r"[Uu][Nn][Ii][Xx]:.*[^/]"
_HTTP = r"[Hh][Tt][Tt][Pp][Ss]?://"
_POINTER = r"(/([^/~]|~[01])+)+"
_SINGLE = (_POINTER, "(path|query|form):[^ ]+", f"header:{_HEADER}")
_PART = "(path|query|header|form):[0-9A-Za-z_.-]+"
_JOINED = f"{_PART}.+{_PART}"
_URL_PATH = r"[A-Za-z0-9._~!$&'()*+,;=:@%/-]*"
_ROUTE_NAME = r"[A-Za-z0-9._-]{1,64}"
_ROUTE = r"""(\*\*)?(/[!"$&-)+-.0-:<->@-\[\]-~]+)+/?|/"""


def _shaped(*patterns: str) -> dict[str, Any]:
    """The schema of text in one of some shapes; without patterns, of any text that is not empty."""
    pattern = {"pattern": f"^({'|'.join(patterns)})$"} if patterns else {"minLength": 1}
    return {"type": "string", **pattern}


def text(value: object) -> str:
    """Text on one line, not empty."""
    if not isinstance(value, str):
        raise ValueError(f"expects text, found {kind(value)}; write it in quotes")
    if not value or not value.isprintable():
        raise ValueError("expects text that is not empty and has no line ends or controls")
    return value


def _identifier(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expects text, found {kind(value)}; write it in quotes")
    if not is_identifier(value):
        raise ValueError(f"expects {IDENTIFIER_RULE}")
    return value


def _address(value: object, info: ValidationInfo) -> Address:
    if isinstance(value, Listen | SocketFile):
        return value
    if isinstance(value, int | list):
        raise ValueError(f'expects host:port, for example "127.0.0.1:8000", found {kind(value)}')
    given = text(value)
    return _socket_file(given, info) if given.startswith("unix:") else Listen.parse(given)


def _socket_file(url: str, info: ValidationInfo) -> SocketFile:
    """`unix:/absolute`, `unix:///absolute`, or `unix:relative` to the configuration's folder."""
    name = url.removeprefix("unix:")
    if name.startswith("//"):
        name = name[2:]
        if not name.startswith("/"):
            raise ValueError("expects unix:/path; a socket's URL has no host")
    if not name or name.endswith("/"):
        raise ValueError("expects unix:/path, the path of a socket")
    path = _beside(name, info)
    if len(os.fsencode(path)) > MAX_SOCKET_NAME_BYTES:
        raise ValueError(f"is a socket path of more than {MAX_SOCKET_NAME_BYTES} bytes; use a shorter one")
    return SocketFile(path)


def _upstream_url(value: object, info: ValidationInfo) -> str:
    given = text(value)
    scheme, _, rest = given.partition(":")
    scheme = scheme.lower()
    if scheme == "unix":
        return str(_socket_file(f"unix:{rest}", info))
    if scheme not in _DEFAULT_PORTS or not rest.startswith("//"):
        raise ValueError("expects http://host:port, https://host:port or unix:/path")
    if "@" in rest:
        raise ValueError("contains a user or a password; remove them, requests are forwarded unchanged")
    authority, _, path = rest[2:].partition("/")
    if path or "?" in rest or "#" in rest:
        raise ValueError("has a path or a query; remove it, targets are forwarded unchanged")
    host, port = endpoint(authority)
    if port == 0:
        raise ValueError("names port 0; write the port on which the backend listens")
    return f"{scheme}://{Listen(host, _DEFAULT_PORTS[scheme] if port is None else port)}"


def _base_url(value: object) -> str:
    given = text(value)
    scheme, _, rest = given.partition("://")
    if scheme.lower() not in _DEFAULT_PORTS or not rest:
        raise ValueError(
            "expects http://host:port or https://host:port, under which the backend reaches data"
        )
    if "@" in rest or "?" in rest or "#" in rest:
        raise ValueError("contains a user, a password or a query; remove it, the token is sent in a header")
    authority, slash, path = rest.partition("/")
    _, port = endpoint(authority)
    if port == 0:
        raise ValueError("names port 0; write the port under which the backend reaches this listener")
    if not re.fullmatch(_URL_PATH, path):
        raise ValueError("has a path with characters that no URL has; encode them, or remove them")
    return f"{scheme.lower()}://{authority}{slash}{path}".rstrip("/")


def _collector_url(value: object) -> str:
    given = text(value)
    parts = urlsplit(given)
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise ValueError("expects the URL of a collector, for example http://127.0.0.1:4318/v1/traces")
    if "@" in parts.netloc:
        raise ValueError("contains a user or a password; set them in OTEL_EXPORTER_OTLP_HEADERS")
    if not all(map(_is_installed, _OTEL)):
        raise ValueError("needs the [otel] extra: pip install 'scopegate[otel]'")
    return given


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def _host_name(value: object) -> str:
    host, port = endpoint(text(value))
    if port is not None:
        raise ValueError("expects a name without a port")
    return host


def _allowed_host(value: object) -> str:
    host = Host.parse(text(value))
    if host is None:
        raise ValueError("expects a host name as in the Host header, such as gate.example or [2001:db8::1]")
    if host.port is not None:
        raise ValueError("contains a port; remove it, names are compared without one")
    return host.bare


def _store_url(value: object, info: ValidationInfo) -> str:
    given = text(value)
    if given == "memory://":
        return given
    if re.match(r"postgres(ql)?(\+\w+)?:", given, re.IGNORECASE):
        raise ValueError("postgresql is not supported yet; write sqlite:///file")
    name = given.removeprefix("sqlite:///")
    if name == given or not name or name[-1] == "/" or name == ":memory:" or "?" in name or "#" in name:
        raise ValueError(
            "expects sqlite:///file (relative to this file), sqlite:////absolute/file or memory://"
        )
    return f"sqlite:///{_beside(name, info)}"


def header_name(value: object) -> str:
    given = text(value)
    if not re.fullmatch(_HEADER, given):
        raise ValueError("expects the name of a header, for example X-Tenant, or null")
    return given


def _route_name(value: object) -> str:
    given = text(value)
    if not re.fullmatch(_ROUTE_NAME, given):
        raise ValueError("expects 1 to 64 of the characters A-Z a-z 0-9 . _ - as the name of a route")
    return given


def _mask_pointer(value: object) -> str:
    given = text(value)
    masking.pointer(given)
    return given


def _risk(value: object) -> RiskClass:
    try:
        return RiskClass(value)
    except ValueError:
        raise ValueError(one_of(RISKS, value)) from None


RISKS = choices(RiskClass)
Text = Annotated[str, Kind(text, _shaped())]
Identifier = Annotated[str, Kind(_identifier, _shaped())]
Identifiers = Annotated[tuple[Identifier, ...], LIST, ONE_OR_MORE]
ListenAddress = Annotated[Address, Kind(_address, _shaped(_HOST + _PORT, "unix:.*[^/]"), str)]
UpstreamUrl = Annotated[str, Kind(_upstream_url, _shaped(f"{_HTTP}{_HOST}({_PORT})?/?", _SOCKET))]
CollectorUrl = Annotated[str | None, Kind(_collector_url, _shaped(_HTTP + r"[^/?#@]+([/?#].*)?")).optional()]
BaseUrl = Annotated[
    str | None, Kind(_base_url, _shaped(f"{_HTTP}{_HOST}({_PORT})?(/{_URL_PATH})?")).optional()
]
HostName = Annotated[str | None, Kind(_host_name, _shaped(_HOST)).optional()]
AllowedHost = Annotated[str, Kind(_allowed_host, _shaped(NAME, BRACKETED))]
StoreUrl = Annotated[str, Kind(_store_url, _shaped("memory://", r"sqlite:///[^?#]*[^?#/]"))]
HeaderName = Annotated[str | None, Kind(header_name, _shaped(_HEADER)).optional()]
RouteName = Annotated[str | None, Kind(_route_name, _shaped(_ROUTE_NAME)).optional()]
MaskPointer = Annotated[
    str, Kind(_mask_pointer, _shaped(r"/(decision_inputs|details)/.+", "/decision_reason"))
]
Risk = Annotated[RiskClass, Kind(_risk, {"enum": list(RISKS)}, lambda risk: risk.value)]


# Files --------------------------------------------------------------------------------------------------


def folder_of(value: object, info: ValidationInfo) -> Path:
    return _beside(str(value) if isinstance(value, Path) else text(value), info)


def _beside(name: str, info: ValidationInfo) -> Path:
    """A name relative to the configuration file's folder. `..` is resolved as text, without links."""
    return Path(os.path.normpath(Path(info.context["folder"] if info.context else ".", name)))


def reads_keys(info: ValidationInfo) -> bool:
    """Whether the context permits reading key files. Commands that only read the log do not need them."""
    return bool((info.context or {}).get("read_keys", True))


def _file(value: object, info: ValidationInfo) -> Path:
    """A file that need not exist yet."""
    path = folder_of(value, info)
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            raise ValueError("names a folder; name a file in it")
    except PermissionError as exc:
        if reads_keys(info):
            raise ValueError("is in a folder that the sidecar cannot enter; permit it") from exc
    except OSError:
        pass
    return path


def _key_file(read: Callable[[Path], object], advice: str) -> Kind:
    """A file in which `read` finds a key."""

    def check(value: object, info: ValidationInfo) -> Path:
        path = folder_of(value, info)
        if reads_keys(info):
            try:
                read(path)
            except KeyFileUnusable as exc:
                raise ValueError(f"{exc}; {advice}") from exc
        return path

    return Kind(check, _shaped()).optional()


def _signing_key(path: Path) -> object:
    from sidecar.files.signing import load_signing_key  # slow to import, and used only if the log is signed

    return load_signing_key(path)


Folder = Annotated[Path, Kind(folder_of, _shaped())]
File = Annotated[Path | None, Kind(_file, _shaped()).optional()]
SigningKeyFile = Annotated[Path | None, _key_file(_signing_key, "`scopegate log keygen FILE` makes one")]
MaskKeyFile = Annotated[Path | None, _key_file(keyfiles.mask_key, "`openssl rand -hex 32` prints one")]


# Routes and the places of facts -------------------------------------------------------------------------


def _pattern(value: object) -> RoutePattern:
    return RoutePattern.parse(text(value))


def _route_path(value: object) -> RoutePath:
    """A path, or a list of paths of which each stands once."""
    if isinstance(value, RoutePath):
        return value
    given = value if isinstance(value, list) else [value]
    if not given:
        raise ValueError("is empty; add a path")
    patterns: list[RoutePattern] = []
    wrong: list[tuple[tuple[int, ...], str]] = []
    for index, each in enumerate(given):
        try:
            pattern = _pattern(each)
            path = (pattern.anywhere, pattern.folded, pattern.rest)
            if any(path == (one.anywhere, one.folded, one.rest) for one in patterns):
                raise ValueError("stands in this list twice; remove one of them")
            patterns.append(pattern)
        except ValueError as exc:
            wrong.append(((index,) if isinstance(value, list) else (), str(exc)))
    if wrong:
        raise Contradiction(*wrong)
    return RoutePath(tuple(patterns))


# The kinds of place that only some bodies can provide, with the kind of body that does.
_IN_A_BODY: Mapping[str, tuple[BodyKind, str]] = {
    "pointer": ("json", "a JSON body"),
    "form": ("form", "a form"),
}


def _source(value: object) -> Source:
    source = Source.parse(text(value))
    for part in source.single:
        if part.kind == "header":
            if not re.fullmatch(_HEADER, part.name):
                raise ValueError("is not a valid header name; write header:Name")
            if ends_here(part.name):
                raise ValueError("is a header that never reaches the backend; name another one")
    return source


def _place(value: object, info: ValidationInfo) -> Source:
    source = _source(value)
    route, bodies = info.data.get("path"), info.data.get("body")
    for part in source.single:
        if part.kind == "path" and route is not None and part.name not in (WHOLE_PATH, *route.names):
            raise ValueError(_unknown_segment(part.name, route.names))
        needed, shown = _IN_A_BODY.get(part.kind, (None, ""))
        if needed is not None and bodies is not None and needed not in bodies:
            raise ValueError(
                f"is read from {shown}, which this route does not take; add {needed} to body, or name "
                "another place such as header:Name"
            )
    return source


def _unknown_segment(name: str, names: Sequence[str]) -> str:
    bare = name.strip("{}")
    if bare in names:
        return f"names a segment with braces; write path:{bare}"
    has = ", ".join(f"{{{each}}}" for each in names) or "none"
    return f"names a segment that the route's path does not have (it has {has}); add it there as {{name}}"


def _scope_place(value: object, info: ValidationInfo) -> Source:
    source = _place(value, info)
    if source.kind == "const":
        raise ValueError("would be the scope of every request; name a place in the request")
    return source


def _body_place(value: object, info: ValidationInfo) -> Source:
    source = _place(value, info)
    if source.kind != "pointer":
        raise ValueError("is a JSON object, which only the body can hold; write a JSON pointer (/member)")
    return source


def _answer_place(value: object) -> Source:
    source = _source(value)
    if source.kind not in ("pointer", "header"):
        raise ValueError("is read from the answer; write a JSON pointer (/member) or header:Name")
    return source


def _media_type(value: object) -> str:
    given = text(value).lower()
    if not is_media_type(given):
        raise ValueError("expects a media type without parameters, such as application/merge-patch+json")
    if given == FORM_TYPE or given.startswith("multipart/"):
        raise ValueError("is a form and never JSON; remove it, and add form or any to body")
    return given


def _one_or_more(item: dict[str, Any], **rules: Any) -> WithJsonSchema:
    """The schema of a list whose only item may stand without brackets."""
    return WithJsonSchema({"anyOf": [item, {"type": "array", "items": item, **rules}]})


_PLACE = _shaped(*_SINGLE, _JOINED, "const:.{1,256}")
_MEDIA_TYPE = _shaped("[!#$%&'*+.^_`|~0-9A-Za-z-]+/[!#$%&'*+.^_`|~0-9A-Za-z-]+")


def _written_place(source: Source | None) -> str | None:
    return None if source is None else str(source)


def _preset(value: object) -> str:
    if value not in presets.NAMES:
        raise ValueError(one_of(presets.NAMES, value))
    return str(value)


Preset = Annotated[str, Kind(_preset, {"enum": list(presets.NAMES)})]
_PATTERN = _shaped(_ROUTE)
Pattern = Annotated[RoutePattern, Kind(_pattern, _PATTERN, lambda pattern: pattern.text)]
GatedPath = Annotated[
    RoutePath,
    Kind(
        _route_path,
        {"anyOf": [_PATTERN, {"type": "array", "items": _PATTERN, "minItems": 1}]},
        lambda path: path.text if len(path.patterns) == 1 else list(path.texts),
    ),
]
_METHOD = {"enum": list(METHODS)}
Methods = Annotated[
    tuple[Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"], ...],
    LIST,
    NOT_EMPTY,
    ONE_OR_MORE,
    _one_or_more(_METHOD, minItems=1),
]
Place = Annotated[Source, Kind(_place, _PLACE, str)]
ScopePlace = Annotated[Source, Kind(_scope_place, _shaped(*_SINGLE, _JOINED), str)]
Places = Annotated[
    tuple[Place, ...],
    LIST,
    ONE_OR_MORE,
    PlainSerializer(lambda places: list(map(str, places))),
    _one_or_more(_PLACE),
]
BodyPlace = Annotated[Source | None, Kind(_body_place, _shaped(_POINTER), _written_place).optional()]
AnswerPlace = Annotated[Source, Kind(_answer_place, _shaped(_POINTER, f"header:{_HEADER}"), str)]
BodyKinds = Annotated[
    tuple[BodyKind, ...],
    LIST,
    NOT_EMPTY,
    ONE_OR_MORE,
    _one_or_more({"type": "string", "enum": list(get_args(BodyKind))}, minItems=1),
]
MediaTypes = Annotated[
    tuple[Annotated[str, Kind(_media_type, _MEDIA_TYPE)], ...], LIST, ONE_OR_MORE, _one_or_more(_MEDIA_TYPE)
]

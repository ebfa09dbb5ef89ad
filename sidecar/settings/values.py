"""What one configuration value may be. A value that cannot work is refused here, before anything starts.

Each check raises ValueError with one sentence that says what is wanted. The sentence never repeats the value,
which may be a secret. What a later release brings is refused as such, never as a typing error.
"""

from __future__ import annotations

import importlib.util
import os
import re
import stat
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field, PlainSerializer, PlainValidator, ValidationInfo, WithJsonSchema

from sidecar.core import masking
from sidecar.core.facts import Source
from sidecar.core.host import Host
from sidecar.core.money import is_whole_micros, to_dollars, to_micros
from sidecar.core.policy import RiskClass
from sidecar.core.target import RoutePattern
from sidecar.files import keyfiles, signing
from sidecar.files.keyfiles import KeyFileUnusable
from sidecar.settings import schema as schema
from sidecar.settings.addresses import Address, Listen, SocketFile, endpoint

LATER = "not yet known, it comes with a later release"

_DEFAULT_PORTS = {"http": 80, "https": 443}
_OTEL = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")
# The longest socket name that every kernel accepts: 107 bytes on Linux, 103 on macOS.
MAX_SOCKET_NAME_BYTES = 103
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


def kind(value: object) -> str:
    """What a value is, for "expects ..., found ..."."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true or false"
    kinds = {
        int: "a number",
        float: "a decimal number",
        str: "text",
        dict: "a map",
        list: "a list",
        tuple: "a list",
    }
    return kinds.get(type(value), "something else")


def text_of(value: object) -> str:
    """Text on one line, not empty."""
    if not isinstance(value, str):
        raise ValueError(f"expects text, found {kind(value)}; write it in quotes")
    if not value or not value.isprintable():
        raise ValueError("expects text that is not empty and has no line ends or controls")
    return value


def micros_of(value: object) -> int:
    """Dollars, exactly, as micro-dollars: a bound is never rounded."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expects an amount of dollars, found {kind(value)}")
    micros = to_micros(value)
    if not is_whole_micros(Decimal(repr(value))):
        raise ValueError("has a fraction of a micro-dollar; use at most six digits after the point")
    return micros


_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "model_type": "keys below it",
}
_BOUNDS = {
    "greater_than": ("must be above", "gt"),
    "greater_than_equal": ("must be at least", "ge"),
    "less_than_equal": ("must be at most", "le"),
}


def sentence(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors in our words: what is wanted, and what was found."""
    name, context = error["type"], error.get("ctx", {})
    if name == "value_error":
        return str(context["error"])
    if name == "missing":
        example = ", for example http://127.0.0.1:9000" if error["loc"] == ("upstream", "url") else ""
        return f"is required; add it{example}"
    if name in _WANTED:
        return f"expects {_WANTED[name]}, found {kind(error['input'])}"
    if name in _BOUNDS:
        words, bound = _BOUNDS[name]
        return f"{words} {context[bound]:.12g}"
    if name == "literal_error":
        return f"expects {context['expected']}".replace("'", "")
    return "has a value that cannot be used here; compare the shipped config/scopegate.yaml"


def some(value: object) -> object:
    """A list with something in it; what is no list is somebody else's to refuse."""
    if isinstance(value, list) and not value:
        raise ValueError("is empty, so nothing would be gated; add one, or remove the key for the default")
    return value


def _address(value: object, info: ValidationInfo) -> Address:
    if isinstance(value, Listen | SocketFile):
        return value
    if isinstance(value, int | list):
        raise ValueError(f'expects host:port, for example "127.0.0.1:8000", found {kind(value)}')
    text = text_of(value)
    return _socket_file(text, info) if text.startswith("unix:") else Listen.parse(text)


def _socket_file(text: str, info: ValidationInfo) -> SocketFile:
    """`unix:/absolute`, `unix:///absolute`, or `unix:relative` to the configuration's folder."""
    name = text.removeprefix("unix:")
    if name.startswith("//"):
        name = name[2:]
        if not name.startswith("/"):
            raise ValueError("expects unix:/path; a socket's URL has no host")
    if not name or name.endswith("/"):
        raise ValueError("expects unix:/path, the name of a socket")
    path = _beside(name, info)
    if len(os.fsencode(path)) > MAX_SOCKET_NAME_BYTES:
        raise ValueError(f"names a socket by more than {MAX_SOCKET_NAME_BYTES} bytes; use a shorter path")
    return SocketFile(path)


def _own_address(value: object, info: ValidationInfo) -> Address:
    address = _address(value, info)
    if not address.is_loopback():
        raise ValueError(
            "must be a loopback address while it asks for no authentication; write 127.0.0.1:9901"
        )
    return address


def _upstream_url(value: object, info: ValidationInfo) -> str:
    text = text_of(value)
    scheme, _, rest = text.partition(":")
    scheme = scheme.lower()
    if scheme == "unix":
        return str(_socket_file(f"unix:{rest}", info))
    if scheme not in _DEFAULT_PORTS or not rest.startswith("//"):
        raise ValueError("expects http://host:port, https://host:port or unix:/path")
    if "@" in rest:
        raise ValueError("holds a user or a password; remove them, requests go up as the client sent them")
    authority, _, path = rest[2:].partition("/")
    if path or "?" in rest or "#" in rest:
        raise ValueError("has a path or a query; remove it, targets go up as the client sent them")
    host, port = endpoint(authority)
    if port == 0:
        raise ValueError("names port 0; write the port on which the backend listens")
    return f"{scheme}://{Listen(host, _DEFAULT_PORTS[scheme] if port is None else port)}"


def _collector_url(value: object) -> str | None:
    if value is None:
        return None
    text = text_of(value)
    parts = urlsplit(text)
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise ValueError("expects the URL of a collector, for example http://127.0.0.1:4318/v1/traces")
    if "@" in parts.netloc:
        raise ValueError("holds a user or a password; give them in OTEL_EXPORTER_OTLP_HEADERS")
    if not all(map(_installed, _OTEL)):
        raise ValueError("needs the [otel] extra: pip install 'scopegate[otel]'")
    return text


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def _host_name(value: object) -> str | None:
    if value is None:
        return None
    host, port = endpoint(text_of(value))
    if port is not None:
        raise ValueError("expects a name without a port")
    return host


def _allowed_host(value: object) -> str:
    host = Host.parse(text_of(value))
    if host is None:
        raise ValueError("expects a name as it stands in Host, such as gate.example or [2001:db8::1]")
    if host.port is not None:
        raise ValueError("names a port; leave it out, names are compared without one")
    return host.bare


def _store_url(value: object, info: ValidationInfo) -> str:
    text = text_of(value)
    if text == "memory://":
        return text
    if re.match(r"postgres(ql)?(\+\w+)?:", text, re.IGNORECASE):
        raise ValueError(f"postgresql is {LATER}; write sqlite:///file")
    name = text.removeprefix("sqlite:///")
    if name == text or not name or name[-1] == "/" or name == ":memory:" or "?" in name or "#" in name:
        raise ValueError(
            "expects sqlite:///file (relative to this file), sqlite:////absolute/file or memory://"
        )
    return f"sqlite:///{_beside(name, info)}"


def _folder(value: object, info: ValidationInfo) -> Path:
    return _beside(str(value) if isinstance(value, Path) else text_of(value), info)


def _beside(name: str, info: ValidationInfo) -> Path:
    """A name that is relative to the configuration file's folder; `..` is taken as it reads."""
    return Path(os.path.normpath(Path(info.context["folder"] if info.context else ".", name)))


def _file(value: object, info: ValidationInfo) -> Path | None:
    """A file that need not be there yet."""
    if value is None:
        return None
    path = _folder(value, info)
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            raise ValueError("names a folder; name a file in it")
    except PermissionError as exc:
        # A command that only reads the log needs no access to the files that the sidecar writes beside it.
        if (info.context or {}).get("read_keys", True):
            raise ValueError("stands in a folder that is closed; let the sidecar enter that folder") from exc
    except OSError:
        pass
    return path


def key_file(read: Callable[[Path], object], advice: str) -> PlainValidator:
    """A file in which `read` finds a key, unless the context says that keys are not read."""

    def check(value: object, info: ValidationInfo) -> Path | None:
        path = None if value is None else _folder(value, info)
        if path is not None and (info.context or {}).get("read_keys", True):
            try:
                read(path)
            except KeyFileUnusable as exc:
                raise ValueError(f"{exc}; {advice}") from exc
        return path

    return PlainValidator(check)


def _mask_pointer(value: object) -> str:
    text = text_of(value)
    masking.pointer(text)
    return text


def _header_name(value: object) -> str | None:
    if value is None:
        return None
    if not _HEADER_NAME.fullmatch(text_of(value)):
        raise ValueError("expects the name of a header, for example X-Tenant, or null")
    return str(value)


def _risk(value: object) -> RiskClass:
    try:
        return RiskClass(value)
    except ValueError:
        *names, last = (risk.value for risk in RiskClass)
        raise ValueError(f"expects {', '.join(names)} or {last}") from None


def _pattern(value: object) -> RoutePattern:
    return RoutePattern.parse(text_of(value))


def _source(value: object, info: ValidationInfo) -> Source:
    source = Source.parse(text_of(value))
    if source.kind == "header" and not _HEADER_NAME.fullmatch(source.name):
        raise ValueError("names a header that cannot exist; write header:Name")
    pattern = info.data.get("path")
    if source.kind == "path" and pattern is not None and source.name not in pattern.names:
        raise ValueError("names a place that this route's path does not have; add it there as {name}")
    return source


def _sources(value: object, info: ValidationInfo) -> tuple[Source, ...]:
    texts = value if isinstance(value, list) else [value]
    if not texts:
        raise ValueError("needs at least one place; remove the key for the default")
    return tuple(_source(text, info) for text in texts)


def _body_source(value: object, info: ValidationInfo) -> Source:
    source = _source(value, info)
    if source.kind != "pointer":
        raise ValueError("is a JSON object, which only the body can hold; write a JSON pointer (/member)")
    return source


def _answer_source(value: object, info: ValidationInfo) -> Source:
    source = _source(value, info)
    if source.kind not in ("pointer", "header"):
        raise ValueError("is read from the answer; write a JSON pointer (/member) or header:Name")
    return source


def _texts(places: tuple[Source, ...]) -> list[str]:
    return [str(place) for place in places]


def _risk_text(risk: RiskClass) -> str:
    return risk.value


def _path_text(pattern: RoutePattern) -> str:
    return pattern.text


# A value is serialized as its text in the file.
AS_TEXT = PlainSerializer(str, return_type=str)

ListenAddress = Annotated[Address, PlainValidator(_address), AS_TEXT, schema.ADDRESS]
OwnAddress = Annotated[Address, PlainValidator(_own_address), AS_TEXT, schema.OWN_ADDRESS]
CollectorUrl = Annotated[str | None, PlainValidator(_collector_url), schema.COLLECTOR_URL]
AllowedHost = Annotated[str, PlainValidator(_allowed_host), schema.ALLOWED_HOST]
HostName = Annotated[str | None, PlainValidator(_host_name), schema.HOST_NAME]
UpstreamUrl = Annotated[str, PlainValidator(_upstream_url), schema.UPSTREAM_URL]
StoreUrl = Annotated[str, PlainValidator(_store_url), schema.STORE_URL]
Folder = Annotated[Path, PlainValidator(_folder), schema.FOLDER]
Dollars = Annotated[
    int, PlainValidator(micros_of), PlainSerializer(to_dollars, return_type=float), schema.DOLLARS
]
HeaderName = Annotated[str | None, PlainValidator(_header_name), schema.HEADER_NAME]
Risk = Annotated[
    RiskClass,
    PlainValidator(_risk),
    PlainSerializer(_risk_text, return_type=str),
    WithJsonSchema({"enum": [risk.value for risk in RiskClass]}),
]
Pattern = Annotated[
    RoutePattern,
    PlainValidator(_pattern),
    PlainSerializer(_path_text, return_type=str),
    schema.PATTERN,
]
Place = Annotated[Source, PlainValidator(_source), AS_TEXT, schema.PLACE]
Places = Annotated[
    tuple[Source, ...],
    PlainValidator(_sources),
    PlainSerializer(_texts, return_type=list[str]),
    schema.PLACES,
]
BodyPlace = Annotated[Source, PlainValidator(_body_source), AS_TEXT, schema.BODY_PLACE]
AnswerPlace = Annotated[Source, PlainValidator(_answer_source), AS_TEXT, schema.ANSWER_PLACE]
File = Annotated[Path | None, PlainValidator(_file), schema.FILE]
SigningKeyFile = Annotated[
    Path | None,
    key_file(signing.load_signing_key, "`scopegate log keygen FILE` makes one"),
    schema.FILE,
]
MaskKeyFile = Annotated[
    Path | None, key_file(keyfiles.mask_key, "`openssl rand -hex 32` prints one"), schema.FILE
]
MaskPointer = Annotated[str, PlainValidator(_mask_pointer), schema.MASK_POINTER]

MAX_SECONDS = 86_400
Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS)]
Grace = Annotated[float, Field(ge=0, le=MAX_SECONDS)]
Bytes = Annotated[int, Field(ge=1, le=1 << 30)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Lifetime = Annotated[int, Field(ge=1, le=366 * MAX_SECONDS)]
Fraction = Annotated[float, Field(ge=0, le=1)]

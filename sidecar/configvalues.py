"""What one configuration value may be. A value that cannot work is refused here, before anything starts.

Each check raises ValueError with one sentence that says what is wanted. The sentence never repeats the value,
which may be a secret. What a later release brings is refused as such, never as a typing error.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PlainSerializer, PlainValidator, ValidationInfo

from sidecar import keyfiles, signing
from sidecar.core import masking
from sidecar.core.facts import Source
from sidecar.core.money import is_whole_micros, to_micros
from sidecar.core.policy import RiskClass
from sidecar.core.target import RoutePattern
from sidecar.errors import KeyFileUnusable

LATER = "not yet known, it comes with a later release"

_ENDPOINT = re.compile(r"(?:\[(?P<six>[^\[\]]+)\]|(?P<host>[A-Za-z0-9._-]+))(?::(?P<port>[0-9]{1,5}))?")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


@dataclass(frozen=True, slots=True)
class Listen:
    """A host and a port. Port 0 is any free port; an IPv6 host is kept without its brackets."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Listen:
        """`host:port` or `[::1]:port`. Raises ValueError."""
        host, port = _endpoint(text)
        if port is None:
            raise ValueError("expects host:port; write the port, too")
        return cls(host, port)

    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


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


def _endpoint(text: str) -> tuple[str, int | None]:
    found = _ENDPOINT.fullmatch(text)
    if not found:
        raise ValueError('expects host:port, for example "127.0.0.1:8000" or "[::1]:8000"')
    host = found["six"] or found["host"]
    try:
        if found["six"]:
            ipaddress.IPv6Address(host)
        elif re.fullmatch(r"[0-9.]+", host):
            ipaddress.IPv4Address(host)
    except ValueError as exc:
        raise ValueError("names no valid IP address; correct it, or give a host name") from exc
    port = None if found["port"] is None else int(found["port"])
    if port is not None and port > 65_535:
        raise ValueError("names a port above 65535; ports go from 0 to 65535")
    return host, port


def _listen(value: object) -> Listen:
    if isinstance(value, int | list):
        raise ValueError(f'expects host:port, for example "127.0.0.1:8000", found {kind(value)}')
    return value if isinstance(value, Listen) else Listen.parse(text_of(value))


def _loopback(value: object) -> Listen:
    listen = _listen(value)
    if not listen.is_loopback():
        raise ValueError(
            "must be a loopback address while it asks for no authentication; write 127.0.0.1:9901"
        )
    return listen


def _upstream_url(value: object) -> str:
    scheme, _, rest = text_of(value).partition(":")
    if scheme.lower() in ("https", "unix", "http+unix"):
        raise ValueError(f"{scheme.lower()} is {LATER}; write http://host:port")
    if scheme.lower() != "http" or not rest.startswith("//"):
        raise ValueError("expects http://host:port")
    if "@" in rest:
        raise ValueError("holds a user or a password; remove them, requests go up as the client sent them")
    authority, _, path = rest[2:].partition("/")
    if path or "?" in rest or "#" in rest:
        raise ValueError("has a path or a query; remove it, targets go up as the client sent them")
    host, port = _endpoint(authority)
    if port == 0:
        raise ValueError("names port 0; write the port on which the backend listens")
    return f"http://{Listen(host, 80 if port is None else port)}"


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
        # Whoever only reads the log need not reach what is written beside it.
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


# Dumped, a value is the text that stands for it in the file.
AS_TEXT = PlainSerializer(str, return_type=str)

Address = Annotated[Listen, PlainValidator(_listen), AS_TEXT]
LoopbackAddress = Annotated[Listen, PlainValidator(_loopback), AS_TEXT]
UpstreamUrl = Annotated[str, PlainValidator(_upstream_url)]
StoreUrl = Annotated[str, PlainValidator(_store_url)]
Folder = Annotated[Path, PlainValidator(_folder)]
Dollars = Annotated[int, PlainValidator(micros_of)]
HeaderName = Annotated[str | None, PlainValidator(_header_name)]
Risk = Annotated[RiskClass, PlainValidator(_risk), PlainSerializer(_risk_text, return_type=str)]
Pattern = Annotated[RoutePattern, PlainValidator(_pattern), PlainSerializer(_path_text, return_type=str)]
Place = Annotated[Source, PlainValidator(_source), AS_TEXT]
Places = Annotated[
    tuple[Source, ...], PlainValidator(_sources), PlainSerializer(_texts, return_type=list[str])
]
BodyPlace = Annotated[Source, PlainValidator(_body_source), AS_TEXT]
AnswerPlace = Annotated[Source, PlainValidator(_answer_source), AS_TEXT]
File = Annotated[Path | None, PlainValidator(_file)]
SigningKeyFile = Annotated[
    Path | None, key_file(signing.load_signing_key, "`scopegate log keygen FILE` makes one")
]
MaskKeyFile = Annotated[Path | None, key_file(keyfiles.mask_key, "`openssl rand -hex 32` prints one")]
MaskPointer = Annotated[str, PlainValidator(_mask_pointer)]

MAX_SECONDS = 86_400
Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS)]
Grace = Annotated[float, Field(ge=0, le=MAX_SECONDS)]
Bytes = Annotated[int, Field(ge=1, le=1 << 30)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Lifetime = Annotated[int, Field(ge=1, le=366 * MAX_SECONDS)]
Fraction = Annotated[float, Field(ge=0, le=1)]

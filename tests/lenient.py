"""What the most careless backend behind the gate could read in a request. Independent of the gate's own code.

A real stack is a proxy, a server, a framework and a handler in a row, and each of them may clean a target up
once more. So the model is a set of things that such a layer does, and every order of them:

1. A layer works on bytes, and does one thing to the whole target (`LAYERS`).
2. A target executes if some chain of layers ends in a path of `Route`, or in one that lacks only its slash.
   At most two of a chain's layers decode escapes, because that is as far as the gate promises to look.
3. Headers move a target: they replace it, take a prefix off it, or stand before it in a URL that is built
   again (`targets`).
4. A body is read with every key cleaned in every way, and with the first or the last of two equal keys
   (`facts`). A fact that has two values in these readings is a way around the gate.

Nothing here may import sidecar: a hole that two models share is found by neither.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

HeaderBytes = Sequence[tuple[bytes, bytes]]

MOST_DECODINGS = 2
MOST_READINGS = 4_000  # of one target: what needs more is no legitimate neighbour of a gated path


@dataclass(frozen=True)
class Route:
    """A path that executes: any path that ends so if `anywhere`. In a segment `*` stands for one or more
    characters, and as the last segment `**` for one or more segments."""

    path: bytes
    anywhere: bool = True

    def matches(self, reading: bytes) -> bool:
        return self._spelled.fullmatch(reading) is not None

    def takes(self, reading: bytes) -> bool:
        """Whether the route is matched, if need be with a slash appended."""
        return self.matches(reading) or (
            self.path.endswith(b"/") and not reading.endswith(b"/") and self.matches(reading + b"/")
        )

    @cached_property
    def _spelled(self) -> re.Pattern[bytes]:
        text = re.escape(self.path).replace(rb"/\*\*", rb"(?:/[^/]+)+").replace(rb"\*", rb"[^/]+")
        return re.compile((rb".*" if self.anywhere else b"") + text, re.DOTALL)


EXECUTE = Route(b"/recovery/execute")
# An exact path, and one with a name in it. To k, s and i other letters fold, such as the Kelvin sign.
HEAL = Route(b"/v1/heal", anywhere=False)
KICK = Route(b"/v1/tasks/*/kick-it", anywhere=False)
ROUTES = (EXECUTE, HEAL, KICK)

# ---- layers ----------------------------------------------------------------------------------------

_PERCENT = re.compile(rb"%([0-9A-Fa-f]{2})")
_PERCENT_U = re.compile(rb"((?:%[uU][0-9A-Fa-f]{4})+)|%([0-9A-Fa-f]{2})")
_OVERLONG = re.compile(
    rb"[\xc0\xc1][\x80-\xbf]|\xe0[\x80-\x9f][\x80-\xbf]|\xf0[\x80-\x8f][\x80-\xbf]{2}"
    rb"|\xf8[\x80-\x87][\x80-\xbf]{3}|\xfc[\x80-\x83][\x80-\xbf]{4}"
)
_EXTENSIONS = (b".json", b".xml", b".do", b".action", b".html")
_BLANK = re.compile(r"[\s\x00-\x20\u00a0]+\Z")


def _text(layer: Callable[[str], str]) -> Callable[[bytes], bytes]:
    """A layer that works on characters; bytes that are none stay as they are."""

    def on_bytes(path: bytes) -> bytes:
        text = layer(path.decode("utf-8", "surrogateescape"))
        return text.encode("utf-8", "surrogateescape")

    return on_bytes


def _decode(path: bytes) -> bytes:
    return _PERCENT.sub(lambda match: bytes([int(match[1], 16)]), path)


def _decode_but_slashes(path: bytes) -> bytes:
    return _PERCENT.sub(
        lambda match: match[0] if match[1].lower() == b"2f" else bytes([int(match[1], 16)]), path
    )


def _decode_u(path: bytes) -> bytes:
    def character(match: re.Match[bytes]) -> bytes:
        if match[2]:
            return bytes([int(match[2], 16)])
        units = b"".join(bytes.fromhex(unit.decode()) for unit in re.findall(rb"[uU](....)", match[1]))
        return units.decode("utf-16-be", "surrogatepass").encode("utf-8", "surrogatepass")

    return _PERCENT_U.sub(character, path)


def _arithmetic_utf8(path: bytes) -> bytes:
    """A decoder that adds the bits of a sequence up and does not ask whether it was the shortest."""

    def character(match: re.Match[bytes]) -> bytes:
        sequence = match[0]
        point = sequence[0] & (0xFF >> (len(sequence) + 1))
        for each in sequence[1:]:
            point = point << 6 | each & 0x3F
        return chr(point).encode("utf-8", "surrogatepass")

    return _OVERLONG.sub(character, path)


def _fold(text: str) -> str:
    lower = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return lower.replace("\u0131", "i")  # upper-cased, a dotless i is an I


def _without(categories: tuple[str, ...]) -> Callable[[bytes], bytes]:
    def remove(text: str) -> str:
        if text.isascii() and text.isprintable():
            return text
        return "".join(each for each in text if unicodedata.category(each) not in categories)

    return _text(remove)


def _resolve(path: bytes) -> bytes:
    start, *segments = path.split(b"/")
    kept: list[bytes] = []
    for segment in segments:
        if segment == b"..":
            kept = kept[:-1]
        elif segment != b".":
            kept.append(segment)
    return b"/".join([start, *kept])


def _trim_segments(text: str) -> str:
    """Windows drops dots and blanks from the end of each name, and so does who trims what it has split."""
    trimmed = []
    for segment in text.split("/"):
        cleaned = segment
        while (shorter := _BLANK.sub("", cleaned).rstrip(".")) != cleaned:
            cleaned = shorter
        trimmed.append(segment if segment in (".", "..") else cleaned)
    return "/".join(trimmed)


def _without_extension(path: bytes) -> bytes:
    for extension in _EXTENSIONS:
        if path.lower().endswith(extension):
            return path[: -len(extension)]
    return path


def _cut(at: bytes) -> Callable[[bytes], bytes]:
    return lambda path: path.partition(at)[0]


def _without_authority(path: bytes) -> bytes:
    """`scheme://authority` and `//authority` are gone from the front."""
    match = re.match(rb"(?:[A-Za-z][A-Za-z0-9+.-]*:)?[/\\]{2,}[^/\\?#]*", path)
    if match is None:
        return path
    rest = path[match.end() :]
    return rest if rest[:1] == b"/" else b"/" + rest


DECODING = (_decode, _decode_but_slashes, _decode_u)
LAYERS: tuple[Callable[[bytes], bytes], ...] = (
    *DECODING,
    _arithmetic_utf8,
    lambda path: path.decode("utf-8", "ignore").encode(),  # drops what is not UTF-8
    _without(("Cc",)),
    _without(("Cf",)),
    lambda path: re.sub(rb"[\t\r\n]", b"", path),  # the URL standard of browsers, and node's URL
    lambda path: path.replace(b"\0", b""),
    _text(_fold),
    lambda path: path.lower(),
    lambda path: path.replace(b"+", b" "),
    lambda path: path.replace(b"\\", b"/"),
    _resolve,
    lambda path: re.sub(rb"/{2,}", b"/", path),
    _cut(b";"),
    _cut(b"#"),
    _cut(b"?"),
    _cut(b"\0"),
    lambda path: re.sub(rb";[^/]*", b"", path),
    lambda path: path.rstrip(b"/"),
    lambda path: path.rstrip(b"."),
    _text(lambda text: _BLANK.sub("", text)),
    _text(_trim_segments),
    _without_extension,
    _without_authority,
    lambda path: path if path.startswith(b"/") else b"/" + path,
)


def reads_as(target: bytes, routes: Sequence[Route] = (EXECUTE,), decodings: int = 0) -> Route | None:
    """The first route that some chain of layers makes of a target that was decoded so often already; None if
    none does within the bound."""
    path = target.partition(b"?")[0]  # a raw ? begins the query for all of them
    fewest = {path: decodings}
    waiting = [(path, decodings)]
    for reading, decodings in waiting:  # grows while it is read
        for route in routes:
            if route.takes(reading):
                return route
        if len(fewest) > MOST_READINGS:
            return None
        for layer in LAYERS:
            spent = decodings + (layer in DECODING)
            if spent > MOST_DECODINGS:
                continue
            made = layer(reading)
            if spent < fewest.get(made, MOST_DECODINGS + 1):
                fewest[made] = spent
                waiting.append((made, spent))
    return None


# ---- headers ---------------------------------------------------------------------------------------

REPLACING = (
    *(b"x-original-url x-rewrite-url x-original-uri x-original-path x-rewrite-uri x-request-uri".split()),
    *(b"x-forwarded-uri x-forwarded-path x-replaced-path x-envoy-original-path".split()),
)
PREFIXES = (b"script-name", b"x-script-name", b"x-forwarded-prefix")
HOSTS = (b"host", b"x-forwarded-host")
SCHEMES = (b"x-forwarded-proto",)
METHODS = (b"x-http-method-override", b"x-http-method", b"x-method-override")


def _values(headers: HeaderBytes, names: tuple[bytes, ...]) -> Iterator[bytes]:
    """The values under these names, all punctuation read as `-`; a list gives itself and its members."""
    for name, value in headers:
        if re.sub(rb"[^0-9a-z]", b"-", name.lower()) in names:
            yield value.strip()
            if b"," in value:
                yield from (member.strip() for member in value.split(b","))


def targets(target: bytes, headers: HeaderBytes) -> Iterable[tuple[bytes, int]]:
    """A target, and every other one that the headers could put in its place, each with how often it was
    decoded on the way."""
    found = [target, *_values(headers, REPLACING)]
    once = _decode(target)
    decoded = []
    prefixes = list(_values(headers, PREFIXES))
    for prefix in prefixes:
        found += [prefix + each for each in found] + [prefix.rstrip(b"/") + target]
        if target.startswith(prefix):
            found.append(target[len(prefix) :])
        if once.startswith(prefix):
            decoded.append(once[len(prefix) :])
    hosts, schemes = list(_values(headers, HOSTS)), [b"http", *_values(headers, SCHEMES)]
    rebuilt = [
        scheme + b"://" + host + prefix + target
        for scheme, host, prefix in product(schemes, hosts, [b"", *prefixes])
        # A plain host and scheme add nothing to the target.
        if prefix or scheme.lower() not in (b"http", b"https") or re.search(rb"[^A-Za-z0-9.:_~\[\]-]", host)
    ]
    return [*((each, 0) for each in dict.fromkeys(found + rebuilt)), *((each, 1) for each in decoded)]


def executes(
    method: bytes, target: bytes, headers: HeaderBytes, routes: Sequence[Route] = (EXECUTE,)
) -> Route | None:
    """The route under which the most careless backend executes a request; None if it does not."""
    if method.upper() != b"POST" and not any(_values(headers, METHODS)):
        return None
    for each, decodings in targets(target, headers):
        found = reads_as(each, routes, decodings)
        if found is not None:
            return found
    return None


# ---- bodies ----------------------------------------------------------------------------------------

FACTS = (("scope_id",), ("incident_id",), ("action",), ("target_agents",), ("parameters", "target_agents"))
CLEANINGS: tuple[Callable[[str], str], ...] = (
    lambda key: key.partition("\0")[0],
    lambda key: "".join(each for each in key if unicodedata.category(each) != "Cc"),
    lambda key: "".join(each for each in key if unicodedata.category(each) != "Cf"),
    lambda key: key.strip(" \t\r\n\0\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0"),
    str.strip,
    str.casefold,
    str.upper,
    lambda key: unicodedata.normalize("NFKC", key),
)


class _Pairs(list[tuple[str, Any]]):
    """The members of an object as they stood, so that equal names are still apart."""


def _is_read_as(key: str, name: str) -> bool:
    if key == name:
        return True
    seen, waiting = {key}, [key]
    for reading in waiting:
        for clean in CLEANINGS:
            made = clean(reading)
            if made in (name, name.upper()):
                return True
            if made not in seen:
                seen.add(made)
                waiting.append(made)
    return False


def _plain(value: Any) -> Any:
    if isinstance(value, _Pairs):
        return {name: _plain(member) for name, member in value}
    return [_plain(member) for member in value] if isinstance(value, list) else value


def _found(document: Any, path: tuple[str, ...]) -> Iterator[Any]:
    if not path:
        yield _plain(document)
    elif isinstance(document, _Pairs):
        for key, value in document:
            if _is_read_as(key, path[0]):
                yield from _found(value, path[1:])
            elif key == "__proto__":  # once JavaScript has copied the object, what it lacks is found there
                yield from _found(value, path)


def facts(body: bytes) -> dict[tuple[str, ...], list[Any]]:
    """Each fact's different values over all readings of a body; a body that is no JSON raises ValueError."""
    document = json.loads(body.decode("utf-8-sig", "replace"), object_pairs_hook=_Pairs)
    values: dict[tuple[str, ...], list[Any]] = {}
    for path in FACTS:
        values[path] = []
        for value in _found(document, path):
            if value not in values[path]:
                values[path].append(value)
    return values

"""The texts that a parser may read in a request target: a bounded search, on values only.

Backends disagree about the meaning of a target. Each rule below is something that a real server, framework or
handler does to a path. A `Step` applies one of these rules, and the search composes the steps in any order.

1. Every framework decodes a percent escape once; behind a careless proxy or handler it is decoded twice. IIS
   also decodes `%u0065`. Lenient UTF-8 decoders accept overlong forms.
2. Parsers drop characters. Bottle drops bytes that are not UTF-8. URL parsers drop tab, line feed and
   carriage return. Handlers that clean their input drop control and format characters (zero width space, soft
   hyphen, byte order mark). A dropped character may stand anywhere: in a name, within an escape, between the
   bytes of one character. Each kind therefore has a step of its own, and decoding may follow it.
3. Parsers replace characters. They fold case and Unicode compatibility forms, read backslashes as slashes, a
   plus sign as a space, and bytes that are not UTF-8 as Latin-1.
4. Parsers resolve and cut paths: dot segments, empty segments, `;parameters`, `#`, `?`, NUL, an extension,
   blanks around a segment, dots at its end, and slashes at the end.
5. A target may be an absolute URL or a reference to another host (`//host/path`), and an application may
   build a URL from headers. The application may then add a prefix from a header to the path, or remove it.

A reading is a text without capital ASCII letters. It represents bytes that are not UTF-8 as lone surrogates,
as Python's surrogateescape does.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote_to_bytes

from sidecar.core.wording import FILLERS

MAX_DECODINGS = 2  # of each part of a target; no backend is promised to be safe that decodes three times
MAX_READINGS = 256  # a plain target has one or two, a strange one some dozens
MAX_CHARACTERS = 1 << 15  # in all readings of one target together, so that a long target is cheap, too

_NOT_UTF8 = re.compile("[\udc80-\udcff]")
NOT_UTF8_EITHER = re.compile("([\udc80-\udcff])")
_OVERLONG = re.compile(
    "[\udcc0\udcc1][\udc80-\udcbf]"
    "|\udce0[\udc80-\udc9f][\udc80-\udcbf]"
    "|\udcf0[\udc80-\udc8f][\udc80-\udcbf]{2}"
    "|\udcf8\udc80[\udc80-\udcbf]{3}"
    "|\udcfc\udc80\udc80[\udc80-\udcbf]{3}"
)
_UTF16_ESCAPES = re.compile(r"((?:%u[0-9a-f]{4})+)")
_CONTROLS = re.compile("[\0-\x1f\x7f-\x9f]")
_LINE_CONTROLS = re.compile("[\t\n\r]")
_SCHEME = re.compile(r"\A[a-z][a-z0-9+.-]*:[/\\]*")
_AUTHORITY = re.compile(r"\A[/\\]{2,}[^/\\]*")
PARAMETERS = re.compile(r";[^/]*")
# In a decoded text: it was escaped twice.
ESCAPE = re.compile(r"%(?:[0-9A-Fa-f]{2}|[uU][0-9A-Fa-f]{4})")
_SLASHES = re.compile(r"//+")
_BLANKS = "".join(chr(code) for code in range(0x3001) if code <= 0x20 or chr(code).isspace())
_BLANK = rf"[{re.escape(_BLANKS)}]"
# A match starts only at the beginning of a run of blanks. Starting at each blank would take seconds.
_BLANK_ENDS = re.compile(rf"(?<!{_BLANK}){_BLANK}++(?=/|\Z)|(?<=/){_BLANK}++")
_TRIMMED = rf"[.{re.escape(_BLANKS)}]"
# A dot segment is not trimmed. With a blank after its dots it is no dot segment, and its end is trimmed.
_SEGMENT_ENDS = re.compile(rf"(?:(?<=[^/.{re.escape(_BLANKS)}])|(?<=/)(?!\.\.?/)){_TRIMMED}+(?=/)")
_EXTENSIONS = (".json", ".xml", ".do", ".action", ".html")

# Default-ignorable characters that are not of category Cf (Unicode: Default_Ignorable_Code_Point).
_IGNORABLE = frozenset(
    FILLERS
    + "\u034f\u17b4\u17b5\u180b\u180c\u180d\u180f\u2065"
    + "".join(map(chr, (*range(0xFE00, 0xFE10), *range(0xFFF0, 0xFFF9), *range(0xE0000, 0xE1000))))
)


def decoded(text: str) -> str:
    """The text with each `%XX` decoded to its byte."""
    return _characters(unquote_to_bytes(text.encode("utf-8", "surrogateescape")))


def _characters(octets: bytes) -> str:
    return octets.decode("utf-8", "surrogateescape")


def _decoded_but_for_slashes(text: str) -> str:
    return "%2f".join(map(decoded, text.split("%2f")))


def decoded_as_by_iis(text: str) -> str:
    """The text with each `%uXXXX` decoded to its UTF-16 unit and each `%XX` to its byte.

    `text` is in lower case. A text without `%u` is returned unchanged.
    """
    if "%u" not in text:
        return text  # `decoded` covers this case
    return "".join(
        _utf16(part) if _UTF16_ESCAPES.fullmatch(part) else decoded(part)
        for part in _UTF16_ESCAPES.split(text)
    )


def _utf16(escapes: str) -> str:
    octets = bytes.fromhex(escapes.replace("%u", ""))
    return octets.decode("utf-16-be", "replace")


def shortened(text: str) -> str:
    """The text with each overlong form of UTF-8 replaced by the character that a lenient decoder reads."""
    return text if text.isascii() else _OVERLONG.sub(_shortened, text)


def _shortened(match: re.Match[str]) -> str:
    code = ord(match[0][0]) & 1  # among these lead bytes only C1 carries a bit
    for continuation in match[0][1:]:
        code = code << 6 | ord(continuation) & 0x3F
    return "\ufffd" if 0xD800 <= code < 0xE000 else chr(code)


def folded(text: str) -> str:
    """The text with case and compatibility forms folded."""
    # Each character is folded by itself. A character composed with its neighbour is never ASCII, and patterns
    # are ASCII. This also avoids sorting long runs of accents.
    return text.lower() if text.isascii() else text.translate({ord(each): fold(each) for each in set(text)})


@lru_cache(maxsize=4096)
def fold(character: str) -> str:
    if character == "\u0130":
        return "i"  # because Java folds it to its first character only
    # Upper case comes first, because the dotless i equals the ASCII i only in upper case.
    changed = unicodedata.normalize("NFKC", character).upper().casefold()
    return unicodedata.normalize("NFKC", changed)


def _without_invalid_bytes(text: str) -> str:
    return text if text.isascii() else _NOT_UTF8.sub("", text)


def _without_controls(text: str) -> str:
    return _rejoined(text, _CONTROLS.sub("", text))


def _without_format_characters(text: str) -> str:
    if text.isascii():
        return text
    return _rejoined(text, text.translate({ord(each): None for each in set(text) if is_format(each)}))


def _rejoined(before: str, after: str) -> str:
    """The text decoded again, because dropping may have joined the bytes of one character."""
    if after == before or after.isascii():
        return after
    return _characters(after.encode("utf-8", "surrogateescape"))


def is_format(character: str) -> bool:
    """Whether a character only formats its neighbours and has no glyph of its own."""
    return unicodedata.category(character) == "Cf" or character in _IGNORABLE


# The characters that a parser may drop, as cumulative choices; the first drops nothing.
DROPPING: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    _without_controls,
    _without_format_characters,
    lambda text: _without_format_characters(_without_controls(text)),
    lambda text: _without_format_characters(_without_controls(_without_invalid_bytes(text))),
)


def _latin1(text: str) -> str:
    return text if text.isascii() else _NOT_UTF8.sub(lambda found: chr(ord(found[0]) - 0xDC00), text)


def _without_dot_segments(text: str) -> str:
    root, *segments = text.split("/")
    kept: list[str] = []
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    return "/".join([root, *kept])


def _without_extension(text: str) -> str:
    for extension in _EXTENSIONS:
        if text.endswith(extension):
            return text[: -len(extension)]
    return text


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that a parser may do to a path. The step uses up `decodings` of MAX_DECODINGS."""

    name: str
    read: Callable[[str], str]
    decodings: int = 0


AT_THE_END = (
    # Routers with optional slashes; file systems that drop dots and spaces.
    Step("dropping slashes, dots or blanks at its end", lambda text: text.rstrip("/." + _BLANKS)),
    # Each by itself, because what is left may be a dot segment, or end with a slash.
    Step("stripping slashes from its end", lambda text: text.rstrip("/")),
    Step("stripping dots from its end", lambda text: text.rstrip(".")),
    # Rails, Spring and Struts read an extension as the requested format.
    Step("dropping an extension", _without_extension),
)
# Any step may follow any other. The order only decides which sequence is found, and named, first.
STEPS: tuple[Step, ...] = (
    # Every framework decodes once. A proxy before it, or a careless handler, decodes a second time.
    Step("percent-decoding", decoded, 1),
    # Many servers decode everything except %2f, and URL libraries read %2e%2e as dots.
    Step("percent-decoding all but slashes", _decoded_but_for_slashes, 1),
    Step("percent-decoding with %u escapes", decoded_as_by_iis, 1),
    # Lenient UTF-8 decoders read C0 AF, E0 80 AF, ... as a slash.
    Step("overlong UTF-8", shortened),
    # Case-insensitive routers; frameworks that normalize, for which U+FF0F is a slash and U+2025 is two dots.
    Step("Unicode folding", folded),
    # Programs that use decode("utf-8", "ignore"), and WSGI, where PATH_INFO is Latin-1.
    Step("dropping bytes that are not UTF-8", _without_invalid_bytes),
    Step("Latin-1", _latin1),
    # URL libraries drop tab, CR and LF, some filters NUL; others drop all control characters. What is left of
    # the others may fill a variable.
    Step("dropping control characters", _without_controls),
    Step("dropping tabs and line ends", lambda text: _rejoined(text, _LINE_CONTROLS.sub("", text))),
    Step("dropping NUL", lambda text: _rejoined(text, text.replace("\0", ""))),
    Step("dropping format characters", _without_format_characters),
    # Windows servers and URL libraries of browsers.
    Step("backslashes as slashes", lambda text: text.replace("\\", "/")),
    # unquote_plus and similar functions, which are meant for queries.
    Step("plus signs as spaces", lambda text: text.replace("+", " ")),
    # RFC 3986, 5.2.4. Composed with other steps, it also resolves the dots that they produce.
    Step("resolving dot segments", _without_dot_segments),
    # nginx, and most routers that split at slashes.
    Step("merging slashes", lambda text: _SLASHES.sub("/", text)),
    # Old servlet containers cut at ";jsessionid"; newer ones drop parameters segment by segment.
    Step("cutting at a semicolon", lambda text: text.partition(";")[0]),
    Step("dropping parameters", lambda text: PARAMETERS.sub("", text)),
    # A parser that decodes a URL before splitting it finds a fragment or a query at %23 or %3F.
    Step("cutting at a #", lambda text: text.partition("#")[0]),
    Step("cutting at a ?", lambda text: text.partition("?")[0]),
    # C strings end at a NUL.
    Step("cutting at a NUL", lambda text: text.partition("\0")[0]),
    # Windows, and routers that trim each segment.
    Step("trimming segments", lambda text: _BLANK_ENDS.sub("", text)),
    Step("stripping the ends of segments", lambda text: _SEGMENT_ENDS.sub("", text)),
    *AT_THE_END,
    # RFC 9112, 3.2.2 obliges every server to accept the absolute form.
    Step("dropping the scheme", lambda text: _SCHEME.sub("//", text)),
    # "//host/path" is a reference to another host for every URL library.
    Step("dropping the authority", lambda text: _AUTHORITY.sub("", text)),
    # Joining a base and a path.
    Step("adding the first slash", lambda text: text if text.startswith("/") else "/" + text),
)


# A path of segments that begin and end with one of these characters, and have dots only within. No step
# changes these characters, but for letters their case, and no step removes a segment of them.
_INERT = r"[!\"$&-*,\-0-:<->@-\[\]^-~]"
_PLAIN = re.compile(rf"(?:/{_INERT}++(?:\.++{_INERT}++)*+)++/?")


def steps_for(path: str) -> Sequence[Step]:
    """The steps that can change a reading of a path: of a plain path only those at its end."""
    return STEPS if _PLAIN.fullmatch(path) is None else AT_THE_END


def taking_off(prefix: str) -> Step:
    """The step of an application that reads its mount point from a header and removes it from the path."""
    wanted = prefix.lower()
    return Step(f"taking off {prefix}", lambda text: text.removeprefix(wanted))


# ---- the search --------------------------------------------------------------------------------------


TOO_MANY = "it has more readings than are tried"


def readings_of(path: str, steps: Sequence[Step] = STEPS) -> Iterator[tuple[str, tuple[str, ...]] | None]:
    """Each reading of a path in lower case, folded and not, with the names of the steps that lead to it.

    The last one is None if there are too many readings to try.
    """
    start = path.lower()
    fewest = {start: 0}  # the smallest number of decodings that leads to each reading
    waiting: deque[tuple[str, int, tuple[str, ...]]] = deque([(start, 0, ())])
    characters = 0
    while waiting:
        text, decodings, way = waiting.popleft()
        seen = folded(text)
        characters += len(seen)
        if len(fewest) > MAX_READINGS or characters > MAX_CHARACTERS:
            yield None
            return
        yield seen, way
        if seen != text:  # folding may turn a character of a variable into a slash
            yield text, way
        for step in steps:
            spent = decodings + step.decodings
            if spent > MAX_DECODINGS:
                continue
            reading = step.read(text).lower()
            if spent < fewest.get(reading, MAX_DECODINGS + 1):
                fewest[reading] = spent
                waiting.append((reading, spent, (*way, step.name)))


def describe(name: str, way: Sequence[str]) -> str:
    """A clause that says which steps lead to a reading that matches `name`."""
    return f"it reaches {name} only by {', '.join(way) or 'folding case'}"

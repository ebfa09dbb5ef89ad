"""Which texts may a parser read in a request target? A bounded search, on values only.

Backends disagree about what a target says. Each rule below is something that a real server, framework or
handler does to a path; a `Step` is one of them, and the search composes the steps in any order.

1. A percent escape is decoded once by every framework and twice behind a careless proxy or handler. IIS also
   decodes `%u0065`. Lenient UTF-8 decoders accept overlong forms.
2. Characters disappear. Bottle drops bytes that are not UTF-8, URL parsers drop tab, line feed and carriage
   return, and handlers that clean their input drop control and format characters (zero width space, soft
   hyphen, byte order mark). What is dropped may stand anywhere: in a name, within an escape, between the
   bytes of one character. So each kind is dropped by a step of its own, and decoding may follow.
3. Characters become others. Case and Unicode compatibility forms are folded, backslashes are slashes, a plus
   sign is a space, and bytes that are not UTF-8 are Latin-1.
4. Paths are resolved and cut: dot segments, empty segments, `;parameters`, `#`, `?`, NUL, an extension,
   blanks around a segment, dots at its end, and slashes at the end.
5. A target may be an absolute URL or a reference to another host (`//host/path`), and an application may
   build one from headers. Then a prefix named by a header is also put before the path, or taken off.

A reading is a text without capital ASCII letters. Bytes that are not UTF-8 are lone surrogates in it, as
Python's surrogateescape writes them.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote_to_bytes

from sidecar.core.wording import FILLERS

MAX_DECODINGS = 2  # of each part of a target; no backend is promised to be safe that decodes three times
MAX_READINGS = 256  # a plain target has one or two, a strange one some dozens
MAX_CHARACTERS = 1 << 15  # in all readings of one target together, so that a long target is cheap, too

_NOT_UTF8 = re.compile("[\udc80-\udcff]")
_NOT_UTF8_EITHER = re.compile("([\udc80-\udcff])")
_OVERLONG = re.compile(
    "[\udcc0\udcc1][\udc80-\udcbf]"
    "|\udce0[\udc80-\udc9f][\udc80-\udcbf]"
    "|\udcf0[\udc80-\udc8f][\udc80-\udcbf]{2}"
    "|\udcf8\udc80[\udc80-\udcbf]{3}"
    "|\udcfc\udc80\udc80[\udc80-\udcbf]{3}"
)
_UTF16_ESCAPES = re.compile(r"((?:%u[0-9a-f]{4})+)")
_CONTROLS = re.compile("[\0-\x1f\x7f-\x9f]")
_SCHEME = re.compile(r"\A[a-z][a-z0-9+.-]*:[/\\]*")
_AUTHORITY = re.compile(r"\A[/\\]{2,}[^/\\]*")
_PARAMETERS = re.compile(r";[^/]*")
_SLASHES = re.compile(r"//+")
_BLANKS = "".join(chr(code) for code in range(0x3001) if code <= 0x20 or chr(code).isspace())
_BLANK = rf"[{re.escape(_BLANKS)}]"
# A run of blanks is tried from its beginning only: from each of its characters it would take seconds.
_BLANK_ENDS = re.compile(rf"(?<!{_BLANK}){_BLANK}++(?=/|\Z)|(?<=/){_BLANK}++")
_TRIMMED = rf"[.{re.escape(_BLANKS)}]"
# A dot segment is none that ends in dots; with a blank behind its dots it is one.
_SEGMENT_ENDS = re.compile(rf"(?:(?<=[^/.{re.escape(_BLANKS)}])|(?<=/)(?!\.\.?/)){_TRIMMED}+(?=/)")
_EXTENSIONS = (".json", ".xml", ".do", ".action", ".html")

# Characters without a shape of their own that are not of category Cf (Unicode: Default_Ignorable_Code_Point).
_IGNORABLE = frozenset(
    FILLERS
    + "\u034f\u17b4\u17b5\u180b\u180c\u180d\u180f\u2065"
    + "".join(map(chr, (*range(0xFE00, 0xFE10), *range(0xFFF0, 0xFFF9), *range(0xE0000, 0xE1000))))
)


def decoded(text: str) -> str:
    """Each `%XX` as the byte that it names."""
    return _characters(unquote_to_bytes(text.encode("utf-8", "surrogateescape")))


def _characters(octets: bytes) -> str:
    return octets.decode("utf-8", "surrogateescape")


def _decoded_but_for_slashes(text: str) -> str:
    return "%2f".join(map(decoded, text.split("%2f")))


def decoded_as_by_iis(text: str) -> str:
    """Each `%uXXXX` as the UTF-16 unit, and each `%XX` as the byte that it names. `text` is in lower case."""
    if "%u" not in text:
        return text  # then it is percent-decoding
    return "".join(
        _utf16(part) if _UTF16_ESCAPES.fullmatch(part) else decoded(part)
        for part in _UTF16_ESCAPES.split(text)
    )


def _utf16(escapes: str) -> str:
    octets = bytes.fromhex(escapes.replace("%u", ""))
    return octets.decode("utf-16-be", "replace")


def shortened(text: str) -> str:
    """Each overlong form of UTF-8 as the character that a lenient decoder takes it for."""
    return text if text.isascii() else _OVERLONG.sub(_shortened, text)


def _shortened(match: re.Match[str]) -> str:
    code = ord(match[0][0]) & 1  # of all these lead bytes only C1 carries a bit
    for continuation in match[0][1:]:
        code = code << 6 | ord(continuation) & 0x3F
    return "\ufffd" if 0xD800 <= code < 0xE000 else chr(code)


def folded(text: str) -> str:
    """The text without differences of case and compatibility forms."""
    # Each character by itself: what composes with a neighbour is not ASCII, as patterns are, and long runs
    # of accents need no sorting.
    return text.lower() if text.isascii() else text.translate({ord(each): _fold(each) for each in set(text)})


@lru_cache(maxsize=4096)
def _fold(character: str) -> str:
    if character == "\u0130":
        return "i"  # for Java, which folds it to its first character only
    # Upper case first: the dotless i meets the ASCII i only there.
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
    """Bytes between which something was dropped may be one character now."""
    if after == before or after.isascii():
        return after
    return _characters(after.encode("utf-8", "surrogateescape"))


def is_format(character: str) -> bool:
    """Whether a character only directs how its neighbours are shown, and has no shape of its own."""
    return unicodedata.category(character) == "Cf" or character in _IGNORABLE


# What a parser may drop, one after the other; "nothing" comes first.
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
    """One thing that a parser may do to a path; `decodings` of MAX_DECODINGS are spent by it."""

    name: str
    read: Callable[[str], str]
    decodings: int = 0


# Each step may follow each; the order only decides which way is found, and named, first.
STEPS: tuple[Step, ...] = (
    # Every framework decodes once; a proxy before it, or a careless handler, makes it twice.
    Step("percent-decoding", decoded, 1),
    # URL libraries see %2e%2e as dots, and many servers decode all else, but leave %2f as it is.
    Step("percent-decoding all but slashes", _decoded_but_for_slashes, 1),
    Step("percent-decoding with %u escapes", decoded_as_by_iis, 1),
    # Lenient UTF-8 decoders take C0 AF, E0 80 AF, ... for a slash.
    Step("overlong UTF-8", shortened),
    # Case-blind routers; frameworks that normalize, for which U+FF0F is a slash and U+2025 two dots.
    Step("Unicode folding", folded),
    # decode("utf-8", "ignore"), and PATH_INFO in WSGI, which is Latin-1.
    Step("dropping bytes that are not UTF-8", _without_invalid_bytes),
    Step("Latin-1", _latin1),
    # URL libraries drop tab, CR and LF; input filters drop the others, too.
    Step("dropping control characters", _without_controls),
    Step("dropping format characters", _without_format_characters),
    # Windows servers and URL libraries of browsers.
    Step("backslashes as slashes", lambda text: text.replace("\\", "/")),
    # unquote_plus and its kin, which are made for queries.
    Step("plus signs as spaces", lambda text: text.replace("+", " ")),
    # RFC 3986, 5.2.4; composed with the others it also works on what they have made.
    Step("resolving dot segments", _without_dot_segments),
    # nginx, and most routers that split at slashes.
    Step("merging slashes", lambda text: _SLASHES.sub("/", text)),
    # Old servlet containers cut at ";jsessionid"; newer ones drop parameters segment by segment.
    Step("cutting at a semicolon", lambda text: text.partition(";")[0]),
    Step("dropping parameters", lambda text: _PARAMETERS.sub("", text)),
    # A parser that decodes before it splits a URL finds a fragment or a query where %23 or %3F was.
    Step("cutting at a #", lambda text: text.partition("#")[0]),
    Step("cutting at a ?", lambda text: text.partition("?")[0]),
    # C strings end there.
    Step("cutting at a NUL", lambda text: text.partition("\0")[0]),
    # Windows, and routers that trim each segment.
    Step("trimming segments", lambda text: _BLANK_ENDS.sub("", text)),
    Step("stripping the ends of segments", lambda text: _SEGMENT_ENDS.sub("", text)),
    # Routers with optional slashes; file systems that drop dots and spaces.
    Step("stripping its end", lambda text: text.rstrip("/." + _BLANKS)),
    # Rails, Spring and Struts take an extension for the format that is wanted.
    Step("dropping an extension", _without_extension),
    # RFC 9112, 3.2.2 obliges every server to take the absolute form.
    Step("dropping the scheme", lambda text: _SCHEME.sub("//", text)),
    # "//host/path" is a reference to another host for every URL library.
    Step("dropping the authority", lambda text: _AUTHORITY.sub("", text)),
    # Joining a base and a path.
    Step("adding the first slash", lambda text: text if text.startswith("/") else "/" + text),
)


def taking_off(prefix: str) -> Step:
    """What an application does that is told by a header where it is mounted."""
    wanted = prefix.lower()
    return Step(f"taking off {prefix}", lambda text: text.removeprefix(wanted))


# ---- the quick test ----------------------------------------------------------------------------------

# Characters that one escape, or one character beyond ASCII, can turn into.
_MAX_MADE = 4
_PLAIN = re.compile(r"[ -$&-~]*")


def could_reach(path: str, names: Collection[str]) -> bool:
    """A cheap test that every path with a reading that has one of `names` as a segment passes.

    It holds a plain path against the names as it is. For any other path it follows what a reading could have
    made of each character, with all escapes decoded. A name stands in the reading in one piece, and the steps
    that split, cut, resolve and drop segments never join two parts of a segment. So each of its characters
    stood in the path, in this order, and what stood between two of them and is gone was not printable ASCII.
    A character beyond ASCII may as well have been folded to a part of the name. Only a percent sign that is
    left, and a byte that is not UTF-8, may be the beginning of anything (`soft`), and then the digits of an
    escape may be gone, too. `hard` and `soft` are sets of positions in the name, one bit each, after a
    character that was kept and after one that may still swallow digits.
    """
    if _PLAIN.fullmatch(path):
        lowered = path.lower()
        return any(name in lowered for name in names)
    text = path.lower()
    for _ in range(MAX_DECODINGS if "%" in text else 0):
        # A byte that is there before may be dropped before, so it is not of one character with an escape.
        text = "".join(map(decoded, _NOT_UTF8_EITHER.split(text))).lower()
    return any(_could_hold(text, name) for name in names)


def _could_hold(text: str, name: str) -> bool:
    wanted: dict[str, int] = {}
    for position, character in enumerate(name):
        wanted[character] = wanted.get(character, 0) | 1 << position
    end = 1 << len(name)

    def kept(hard: int, soft: int, character: str) -> tuple[int, int]:
        hard = ((hard | soft | 1) & wanted.get(character, 0)) << 1
        return hard, soft if character in "0123456789abcdefu" else 0

    hard = soft = 0
    for character in text:
        if " " <= character <= "~" and character != "%":
            hard, soft = kept(hard, soft, character)
        else:
            made = _fold(character)
            if "%" in made or "\udc80" <= character <= "\udcff":
                soft |= hard | 1
                for _ in range(_MAX_MADE):
                    soft |= soft << 1
                hard = 0
            else:
                after = hard, soft
                for each in filter(str.isascii, made):
                    after = kept(*after, each)
                hard, soft = hard | after[0], soft | after[1]
        if (hard | soft) >= end:
            return True
    return False


# ---- the search --------------------------------------------------------------------------------------


def other_reading(path: str, matched: Callable[[str], str | None], more: Sequence[Step] = ()) -> str | None:
    """A clause that says how some reading of the path is matched; None if none is.

    `matched` is given each reading in its folded form and names what it matches. Readings that are too many
    to try are a clause, too.
    """
    steps = (*STEPS, *more)
    start = path.lower()
    fewest = {start: 0}  # each reading, and the fewest decodings that lead to it
    waiting: deque[tuple[str, int, tuple[str, ...]]] = deque([(start, 0, ())])
    characters = 0
    while waiting:
        text, decodings, way = waiting.popleft()
        seen = folded(text)
        characters += len(seen)
        if len(fewest) > MAX_READINGS or characters > MAX_CHARACTERS:
            return "it has more readings than are tried"
        found = matched(seen)
        if found is not None:
            return f"it reaches {found} only by {', '.join(way) or 'folding case'}"
        for step in steps:
            spent = decodings + step.decodings
            if spent > MAX_DECODINGS:
                continue
            reading = step.read(text).lower()
            if spent < fewest.get(reading, MAX_DECODINGS + 1):
                fewest[reading] = spent
                waiting.append((reading, spent, (*way, step.name)))
    return None

"""Targets and bodies that mean something else than they seem: a plain one, deformed one to four times.

Each deformation undoes one thing that a careless parser does: what it drops is put in, what it decodes is
encoded. So one generated target in two or three reaches a gated path by readings that nobody wrote down. The
other half of the examples are random pieces. Whether an example is dangerous, tests/lenient.py says.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

PATH = b"/recovery/execute"
# Of tests/lenient.py's routes.
PATHS = (PATH, PATH, PATH, b"/v1/heal", b"/v1/tasks/t7/kick-it")

# ---- targets ---------------------------------------------------------------------------------------

CONTROLS = [bytes([code]) for code in (*range(0x20), 0x7F)] + [
    chr(code).encode() for code in range(0x80, 0xA0)
]
FORMATS = [
    chr(code).encode()
    for code in (0xAD, 0x600, 0x61C, 0x180E, 0x200B, 0x200D, 0x202E, 0x2060, 0x2066, 0xFEFF, 0xE0065)
]
BROKEN = [
    b"\xff",
    b"\x80",
    b"\xc0",
    b"\xc1",
    b"\xc3",
    b"\xe2\x80",
    b"\xf0\x9f\x98",
    b"\xfe\xff",
    b"\xed\xa0\x80",
    b"\xf5\x80\x80\x80",
]
BLANKS = [b" ", b"+", b"\t", b"\n", b"\xc2\xa0", b"\xe3\x80\x80", b"\xe2\x80\xa8", b".", b"/", b"\x85"]
CUTS = [b";", b"#", b"?", b"\0", b"%3f", b"%23", b"%3b"]
JUNK = [b"", b"x", b"/x", b"jsessionid=1", b"/../y", b".png", b"%zz", b"=%2f", b"//", b"a/b/c"]
EXTENSIONS = [b".json", b".xml", b".do", b".action", b".html", b".JSON", b".Do"]
PREFIXES = [
    b"",
    b"",
    b"",
    b"/api/v1",
    b"/api",
    b"//host",
    b"http://host",
    b"HTTPS://u:p@host:1",
    b"/x;v=1",
    b"/a%2fb",
    b"/..",
    b"\\",
]


@lru_cache(maxsize=256)
def lookalikes(letter: str) -> tuple[bytes, ...]:
    """The characters that compatibility forms and case folding take for an ASCII one."""
    found = [
        chr(code)
        for code in (*range(0xA0, 0x2700), *range(0xFB00, 0x10000), *range(0x1D400, 0x1D800))
        if unicodedata.normalize("NFKC", chr(code)).casefold() == letter
    ]
    return tuple(each.encode() for each in found if not "\ud800" <= each < "\ue000")


def _cut_up(draw: random.Random, path: bytes) -> int:
    return draw.randrange(len(path) + 1)


def _insert(pieces: Sequence[bytes]) -> Callable[[random.Random, bytes], bytes]:
    def insert(draw: random.Random, path: bytes) -> bytes:
        for _ in range(draw.choice((1, 1, 1, 2, 5))):
            at = _cut_up(draw, path)
            path = path[:at] + draw.choice(pieces) + path[at:]
        return path

    return insert


def _append(pieces: Sequence[bytes]) -> Callable[[random.Random, bytes], bytes]:
    def append(draw: random.Random, path: bytes) -> bytes:
        return path + b"".join(draw.choice(pieces) for _ in range(draw.choice((1, 1, 2))))

    return append


def _at_some_byte(change: Callable[[random.Random, int], bytes]) -> Callable[[random.Random, bytes], bytes]:
    def deform(draw: random.Random, path: bytes) -> bytes:
        share = draw.choice((0.0, 0.0, 0.2, 1.0))
        chosen = {draw.randrange(len(path))} if path else set()
        return b"".join(
            change(draw, byte) if at in chosen or draw.random() < share else bytes([byte])
            for at, byte in enumerate(path)
        )

    return deform


def _escaped(draw: random.Random, byte: int) -> bytes:
    return (b"%%%02x" if draw.random() < 0.7 else b"%%%02X") % byte


def _escaped_u(draw: random.Random, byte: int) -> bytes:
    return (b"%%u%04x" if draw.random() < 0.7 else b"%%U%04X") % byte if byte < 0x80 else bytes([byte])


def _overlong(draw: random.Random, byte: int) -> bytes:
    if byte >= 0x80:
        return bytes([byte])
    high, low = byte >> 6, 0x80 | byte & 0x3F
    return draw.choice(
        (
            bytes([0xC0 | high, low]),
            bytes([0xE0, 0x80 | high, low]),
            bytes([0xF0, 0x80, 0x80 | high, low]),
            bytes([0xF8, 0x80, 0x80, 0x80 | high, low]),
        )
    )


def _alike(draw: random.Random, byte: int) -> bytes:
    found = lookalikes(chr(byte).lower()) if 0x20 < byte < 0x7F else ()
    return draw.choice(found) if found else bytes([byte])


def _other_case(draw: random.Random, byte: int) -> bytes:
    return bytes([byte]).swapcase()


def _at_some_slash(pieces: Sequence[bytes]) -> Callable[[random.Random, bytes], bytes]:
    def deform(draw: random.Random, path: bytes) -> bytes:
        slashes = [at for at, byte in enumerate(path) if byte == 0x2F]
        if not slashes:
            return path
        at = draw.choice(slashes)
        return path[:at] + draw.choice(pieces) + path[at + 1 :]

    return deform


def _cut_off(draw: random.Random, path: bytes) -> bytes:
    return path + draw.choice(CUTS) + draw.choice(JUNK)


def _rotated(draw: random.Random, path: bytes) -> bytes:
    return path[1:] if path[:1] == b"/" else path


DEFORMATIONS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _insert(CONTROLS),
    _insert(FORMATS),
    _insert(BROKEN),
    _insert([*CONTROLS, *FORMATS, *BROKEN]),
    _append(BLANKS),
    _append(EXTENSIONS),
    _cut_off,
    _at_some_byte(_escaped),
    _at_some_byte(_escaped),
    _at_some_byte(_escaped_u),
    _at_some_byte(_overlong),
    _at_some_byte(_alike),
    _at_some_byte(_other_case),
    _at_some_slash((b"//", b"///", b"\\", b"/\\", b"%2f", b"%5c", b"%252f", b"%u2215")),
    _at_some_slash((b"/./", b"/x/../", b"/x/y/../../", b"/%2e/", b"/x/..;/", b"/../", b"/x/%2e%2e/")),
    _at_some_slash((b";x/", b";/", b";a=b;c/", b"./", b" /", b"+/", b"%20/")),
    _rotated,
)
# What no client can send in a target: it is escaped before anything else is.
_UNSENDABLE = re.compile(rb"[^!-~]")
PIECES = [
    *(b"/ // \\ %2f %5c . .. %2e ; # ? %00 %0a %ff + %20 %25 % 2 f u 0 % %u00 65 api v1 x".split()),
    *(b"recovery execute exec ute RECOVERY re covery %65 .json .do http: host /v1/heal kick-it t7".split()),
    *(b"/v2 tasks t7 :kick-it s/restart files purge red:a7 kick heal/ { }".split()),
]


def target(draw: random.Random, paths: Sequence[bytes] = PATHS) -> bytes:
    """A target as a client can send it: a gated path deformed, or a row of pieces of one."""
    if draw.random() < 0.15:
        return b"/" + b"".join(draw.choice(PIECES) for _ in range(draw.randrange(1, 12)))
    path = draw.choice(paths)
    for _ in range(draw.randrange(1, 5)):
        path = draw.choice(DEFORMATIONS)(draw, path)
    return _UNSENDABLE.sub(lambda match: b"%%%02x" % match[0][0], draw.choice(PREFIXES) + path)


def request(draw: random.Random, paths: Sequence[bytes] = PATHS) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """A target, and in one of five cases a header that has the gated path, or the beginning of it."""
    made, kind = target(draw, paths), draw.random()
    if kind < 0.8:
        return made, []
    elsewhere = draw.choice((b"/health", b"/x", b"/execute"))
    if kind < 0.86:
        return elsewhere, [(draw.choice((b"X-Original-URL", b"x_rewrite_url", b"X.Forwarded.Uri")), made)]
    # Part of it stands in a header that a URL is built from, and the rest in the target.
    slashes = [at for at, byte in enumerate(made) if byte == 0x2F and at > 0] or [len(made)]
    at = draw.choice((draw.choice(slashes), len(made)))
    before, after = made[:at], made[at:] or draw.choice((b"/", b"/foo"))
    end = draw.choice((b"", b"", b"?", b"#", b";", b"/"))
    name, start = draw.choice(
        (
            (b"X-Forwarded-Prefix", b""),
            (b"X_Forwarded_Prefix", b"/x, "),
            (b"X-Forwarded-Host", b"host"),
            (b"X-Forwarded-Host", b"u@host:1"),
            (b"X-Forwarded-Proto", b"http://host"),
        )
    )
    return after, [(name, start + before + end)]


# ---- bodies ----------------------------------------------------------------------------------------

FACTS: dict[str, Any] = {
    "scope_id": "scope_1",
    "incident_id": "inc_1",
    "action": "retry_agent",
    "parameters": {"n": 1, "target_agents": ["a", "b"]},
    "target_agents": ["a", "b"],
}
OTHER_VALUES = ['"failover"', '"x"', "null", '""', "1", '["c"]', '{"target_agents":["c"]}', "{}", "true"]
INSERTED = ["\x00", "\x01", "\n", "\x7f", "\x85", "\u200b", "\xad", "\ufeff", "\u2060", "\U000e0041"]
AROUND = [" ", "\t", "\xa0", "\u3000", "\u2028", "\x00", "\x0b", "\x1f", "\u200b"]
# Most are numbers for every parser.
NUMBERS = [*(12 * ["1", "1.5"]), "0", "-0", "1.0", "1e2", "1E+2", "9007199254740993", "1e308", "5e-324"]
NUMBERS += ["1.7976931348623157e308", "123456789012345678901234567890", "1e999", "-1e999", "1e-999", "NaN"]
NUMBERS += ["Infinity", "-Infinity", "01", "+1", ".5", "1.", "0x1", "1_0"]
STRINGS = [
    '"\\ud800"',
    '"\\udc00\\ud800"',
    '"\\ud83d\\ude00"',
    '"\\u0000"',
    '"\\/"',
    "'x'",
    '"a\tb"',
    '"\xe9"',
]
NOISE = ["{", "}", "[", "]", ",", ":", '"', "\\", "\x00", "/**/", "//\n", "\ufeff", "nul", "\\u0061", "'"]


def _twin_of(draw: random.Random, name: str) -> str:
    """A key that a careless backend may take for this one, or that is this one; unescaped."""
    if draw.random() < 0.03:
        return "__proto__"
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3))):
        at = draw.randrange(len(name) + 1)
        match draw.randrange(7):
            case 0:
                name = name[:at] + draw.choice(INSERTED) + name[at:]
            case 1:
                name = draw.choice((name.upper(), name.title(), name.swapcase(), name.lower()))
            case 2:
                name = draw.choice(AROUND) + name
            case 3:
                name += draw.choice(AROUND)
            case 4:
                name += "\x00" + draw.choice(("", "x", "\x00", "tail"))
            case 5 if at < len(name) and (found := lookalikes(name[at].lower())):
                name = name[:at] + draw.choice(found).decode() + name[at + 1 :]
            case _:
                name = draw.choice((name, name + "s", "x" + name, name[:-1] or "x"))
    return name


def _written(draw: random.Random, text: str) -> str:
    """A JSON string, some of its characters escaped."""
    share = draw.choice((0.0, 0.0, 0.2, 1.0))
    shown = "".join(
        "".join(f"\\u{unit:04x}" for unit in _units(each))
        if each in '"\\' or (each < " " and draw.random() < 0.97) or draw.random() < share
        else each
        for each in text
    )
    return f'"{shown}"'


def _units(character: str) -> list[int]:
    raw = character.encode("utf-16-be", "surrogatepass")
    return [int.from_bytes(raw[start : start + 2], "big") for start in range(0, len(raw), 2)]


def body(draw: random.Random) -> bytes:
    """A body for a gated path: its facts, other members, twins of keys, and faults of every sort."""
    members = [(_written(draw, name), json.dumps(value)) for name, value in FACTS.items()]
    noise: list[tuple[str, float]] = []
    for _ in range(draw.randrange(0, 5)):
        match draw.randrange(10):
            case 0 | 1 | 2:
                name = _twin_of(draw, draw.choice(list(FACTS)))
                members.append((_written(draw, name), draw.choice(OTHER_VALUES)))
            case 3:
                members.append((_written(draw, _twin_of(draw, "note")), draw.choice(NUMBERS + STRINGS)))
            case 4:
                inner = _written(draw, _twin_of(draw, "target_agents"))
                value = f'{{"n":{draw.choice(NUMBERS)},{inner}:{draw.choice(OTHER_VALUES)}}}'
                members = [pair for pair in members if "parameters" not in pair[0]]
                members.append(('"parameters"', value))
            case 5:
                at = draw.randrange(len(members))
                members[at] = (members[at][0], draw.choice(OTHER_VALUES + NUMBERS + STRINGS))
            case 6 if len(members) > 1:
                members.pop(draw.randrange(len(members)))
            case 7:
                depth = draw.choice((3, 50, 199, 250))
                members.append(('"deep"', "[" * depth + '{"a":1}' + "]" * depth))
            case 8:
                members.append(
                    ('"x"', f"{{{_written(draw, 'a')}:1,{_written(draw, _twin_of(draw, 'a'))}:2}}")
                )
            case 9 if draw.random() < 0.4:
                noise.append((draw.choice(NOISE), draw.random()))
    draw.shuffle(members)
    blank = draw.choice(("", "", "", " ", "\n\t"))
    text = "{" + f",{blank}".join(f"{name}{blank}:{value}" for name, value in members) + "}"
    for inserted, share in noise:
        at = round(share * len(text))
        text = text[:at] + inserted + text[at:]
    if draw.random() < 0.1:
        text = draw.choice(("", " ", "\ufeff", "\x00")) + text + draw.choice(("\n", "\x00", "{}", "x", ","))
    raw = text.encode()
    if draw.random() < 0.02:
        at = draw.randrange(len(raw))
        raw = raw[:at] + draw.choice(BROKEN) + raw[at:]
    return raw

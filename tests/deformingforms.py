"""Forms and queries that mean something else than they seem, made as tests/deforming.py makes bodies."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tests.deforming import AROUND, BROKEN, INSERTED, lookalikes

FACTS = {"scope_id": "scope_1", "incident_id": "inc 1", "action": "retry_agent", "target": "shop/cart-0"}
OTHER_VALUES = [
    "failover",
    "",
    "x",
    "a;action=failover",
    "b;x=1;target=all",
    "1&action=x",
    "\xe9",
    "a+b",
    "%",
]
NOISE = [b"%", b"%zz", b"%u0061", b"\x00", b"\r\n", b" ", b"&&", b"=", b"&=", b";", b"%26", b"+", b"[", b"]"]


def _twin_of(draw: random.Random, name: str) -> str:
    """A name that a careless backend may take for this one, or that is this one."""
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3))):
        at = draw.randrange(len(name) + 1)
        match draw.randrange(9):
            case 0:
                name = name[:at] + draw.choice(INSERTED) + name[at:]
            case 1:
                name = draw.choice((name.upper(), name.title(), name.swapcase()))
            case 2:
                name = draw.choice(AROUND) + name
            case 3:
                name += draw.choice(AROUND)
            case 4:
                name += draw.choice(("[]", "[x]", "[0][]", "[", ".x", "\x00x", "]"))
            case 5 if at < len(name) and (found := lookalikes(name[at].lower())):
                name = name[:at] + draw.choice(found).decode() + name[at + 1 :]
            case 6:
                name = name.replace("_", draw.choice((".", " ", "[", "-")))
            case 7:
                name = draw.choice(("x;", ";", "x; ", "a=b;")) + name
            case _:
                name = draw.choice((name, name + "s", "x" + name, name[:-1] or "x", "x." + name))
    return name


def _written(draw: random.Random, text: str) -> bytes:
    share = draw.choice((0.0, 0.0, 0.3, 1.0))
    escape = draw.choice(("%%%02x", "%%%02X"))
    keeps_controls, keeps_others = draw.random() < 0.05, draw.random() < 0.1
    made = b""
    for each in text:
        raw = each.encode("utf-8", "surrogatepass")
        if each == " ":
            made += draw.choice((b"+", b"+", b" ", b"%20"))
        elif (
            each in "&=%+#"
            or (each < " " and not keeps_controls)
            or (not each.isascii() and not keeps_others)
            or (share and draw.random() < share)
        ):
            made += "".join(escape % byte for byte in raw).encode()
        else:
            made += raw
    return made


def _joined(draw: random.Random, pairs: Sequence[tuple[str, str]]) -> bytes:
    fields = []
    for name, value in pairs:
        equals = b"" if not value and draw.random() < 0.3 else b"="
        fields.append(_written(draw, name) + equals + _written(draw, value))
    separator = b";" if draw.random() < 0.03 else b"&"
    return separator.join(fields)


def _twins(draw: random.Random, chances: Sequence[int]) -> list[tuple[str, str]]:
    wanted = [*FACTS, *FACTS, "note", "_method"]
    return [
        (_twin_of(draw, draw.choice(wanted)), draw.choice(OTHER_VALUES)) for _ in range(draw.choice(chances))
    ]


def form(draw: random.Random) -> tuple[bytes, bytes]:
    """A form with facts, twins of their names and faults of every sort, and the query of its request."""
    pairs = [pair for pair in FACTS.items() if draw.random() < 0.95]
    pairs += _twins(draw, (0, 0, 1, 1, 2))
    if draw.random() < 0.3:
        pairs += [("note", draw.choice(OTHER_VALUES)), ("n", "1")]
    draw.shuffle(pairs)
    body = _joined(draw, pairs)
    if draw.random() < 0.01:
        body = b"f=1&" * draw.choice((990, 1000, 1010)) + body
    if draw.random() < 0.1:
        at = draw.randrange(len(body) + 1)
        body = body[:at] + draw.choice([*NOISE, *BROKEN]) + body[at:]
    query = _joined(draw, _twins(draw, (0, 0, 0, 1, 2)) + [("page", "1")] * draw.randrange(2))
    return body, query

"""Answers that cannot be trusted: one verdict wherever packets split them, and it comes at once."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.upstream._answer import MAX_HEAD_BYTES, AnswerParser, AnswerState
from tests.client import Message, ask
from tests.support import EXECUTE, Backend, House, replies, sends

LINE = b"HTTP/1.1 200 OK\r\n"
CHUNKED = LINE + b"Transfer-Encoding: chunked\r\n"
NO_BODY = b"Content-Length: 0\r\n\r\n"
OK_CHUNKS = b"\r\n2\r\nok\r\n0\r\n\r\n"
SWITCH = b"HTTP/1.1 101 S\r\nUpgrade: websocket\r\nConnection: upgrade\r\n"


def filled(size: int, *, body: bytes = b"ok") -> bytes:
    """A whole answer whose head has so many bytes."""
    start, end = LINE + b"X: ", b"\r\nContent-Length: %d\r\n\r\n" % len(body)
    return start + b"x" * (size - len(start) - len(end)) + end + body


# By name: an answer whose head is refused.
REFUSED_HEADS: dict[str, bytes] = {
    "chunked twice": CHUNKED + b"Transfer-Encoding: chunked\r\n" + OK_CHUNKS,
    "gzip, chunked": LINE + b"Transfer-Encoding: gzip, chunked\r\n" + OK_CHUNKS,
    "chunked, chunked": LINE + b"Transfer-Encoding: chunked, chunked\r\n" + OK_CHUNKS,
    "chunked, gzip": LINE + b"Transfer-Encoding: chunked, gzip\r\n" + OK_CHUNKS,
    "identity": LINE + b"Transfer-Encoding: identity\r\n\r\nok",
    "an empty coding": LINE + b"Transfer-Encoding:\r\n\r\nok",
    "gzip, then chunked": LINE + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n" + OK_CHUNKS,
    "chunked with a parameter": LINE + b"Transfer-Encoding: chunked;q=1\r\n" + OK_CHUNKS,
    "a vertical tab before chunked": LINE + b"Transfer-Encoding: \x0bchunked\r\n" + OK_CHUNKS,
    "a length and chunked": LINE + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n" + OK_CHUNKS,
    "chunked and a length": CHUNKED + b"Content-Length: 2\r\n" + OK_CHUNKS,
    "chunked and no length": CHUNKED + b"Content-Length: 0\r\n" + OK_CHUNKS,
    "gzip and a length": LINE + b"Content-Length: 2\r\nTransfer-Encoding: gzip\r\n\r\nok",
    "two equal lengths": LINE + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nok",
    "two lengths": LINE + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nok",
    "two lengths in one": LINE + b"Content-Length: 2, 2\r\n\r\nok",
    "an empty length": LINE + b"Content-Length:\r\n\r\n",
    "a signed length": LINE + b"Content-Length: +2\r\n\r\nok",
    "a negative length": LINE + b"Content-Length: -2\r\n\r\nok",
    "a length in hexadecimal": LINE + b"Content-Length: 0x2\r\n\r\nok",
    "a length beyond 64 bits": LINE + b"Content-Length: 18446744073709551618\r\n\r\nok",
    "HTTP/2.0": b"HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "HTTP/0.9": b"HTTP/0.9 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "HTTP/1.2": b"HTTP/1.2 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "HTTP/1.10": b"HTTP/1.10 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "http/1.1": b"http/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "ICY": b"ICY 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "no status line": b"ok, done\r\n",
    "a banner": b"SSH-2.0-OpenSSH_9.6\r\n",
    "a body first": b"ok\r\n" + LINE + NO_BODY,
    "an empty line first": b"\r\n" + LINE + NO_BODY,
    "two empty lines first": b"\r\n\r\n" + LINE + NO_BODY,
    "a space first": b" " + LINE + NO_BODY,
    "status 099": b"HTTP/1.1 099 Odd\r\n" + NO_BODY,
    "status 000": b"HTTP/1.1 000 Odd\r\n" + NO_BODY,
    "status 600": b"HTTP/1.1 600 Odd\r\n" + NO_BODY,
    "status 999": b"HTTP/1.1 999 Odd\r\n" + NO_BODY,
    "status 20": b"HTTP/1.1 20 OK\r\n" + NO_BODY,
    "status 2000": b"HTTP/1.1 2000 OK\r\n" + NO_BODY,
    "status -200": b"HTTP/1.1 -200 OK\r\n" + NO_BODY,
    "no status": b"HTTP/1.1 OK\r\n" + NO_BODY,
    "NUL in the reason": b"HTTP/1.1 200 O\0K\r\n" + NO_BODY,
    "a control in the reason": b"HTTP/1.1 200 O\x1bK\r\n" + NO_BODY,
    "a bare CR in the reason": b"HTTP/1.1 200 O\rK\r\n" + NO_BODY,
    "a header without colon": LINE + b"X-Odd\r\n" + NO_BODY,
    "a header without name": LINE + b": odd\r\n" + NO_BODY,
    "a space before the colon": LINE + b"X : odd\r\n" + NO_BODY,
    "a space in the name": LINE + b"X Y: odd\r\n" + NO_BODY,
    "a control in the name": LINE + b"X\x01: odd\r\n" + NO_BODY,
    "a space before the first header": LINE + b" X: odd\r\n" + NO_BODY,
    "a folded header": LINE + b"X: a\r\n b\r\n" + NO_BODY,
    "a header folded with a tab": LINE + b"X: a\r\n\tb\r\n" + NO_BODY,
    "a folded coding": LINE + b"Transfer-Encoding:\r\n chunked\r\n" + OK_CHUNKS,
    "NUL in a header": LINE + b"X: a\0b\r\n" + NO_BODY,
    "a bare CR in a header": LINE + b"X: a\rb\r\n" + NO_BODY,
    "a bare LF in a header": LINE + b"X: a\nY: b\r\n" + NO_BODY,
    "a bare LF behind the status": b"HTTP/1.1 200 OK\nX: a\r\n" + NO_BODY,
    "bare LF throughout": b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
    "a bare LF for the empty line": LINE + b"Content-Length: 0\r\n\n",
    "a bare CR for the empty line": LINE + b"Content-Length: 0\r\n\r" + LINE,
    "a head of 65,537 bytes": filled(MAX_HEAD_BYTES + 1),
    "a head of 66,000 bytes": filled(66_000),
    "a head of 70,000 bytes": filled(70_000),
    "a head of 70,000 bytes in small headers": LINE + b"A: b\r\n" * 11_700 + NO_BODY,
    "interim heads of 70,000 bytes": b"HTTP/1.1 103 E\r\n\r\n" * 3_900 + LINE + NO_BODY,
    "an interim answer with a body": b"HTTP/1.1 103 E\r\nContent-Length: 2\r\n\r\nok" + LINE + NO_BODY,
    "a 100 with a length": b"HTTP/1.1 100 C\r\nContent-Length: 2\r\n\r\n" + LINE + NO_BODY,
    "an interim answer in chunks": b"HTTP/1.1 103 E\r\nTransfer-Encoding: chunked\r\n" + OK_CHUNKS,
    "a refused head behind an interim one": b"HTTP/1.1 103 E\r\n\r\nHTTP/2.0 200 OK\r\n" + NO_BODY,
    "a refused interim head": b"HTTP/2.0 103 E\r\n\r\n" + LINE + NO_BODY,
    "something behind an interim answer": b"HTTP/1.1 103 E\r\n\r\n\r\n" + LINE + NO_BODY,
    "101 unasked": SWITCH + b"\r\n",
    "101 unasked, with bytes": SWITCH + b"\r\n\x81\x02ok",
    "101 unasked, with a length": SWITCH + b"Content-Length: 2\r\n\r\nok",
    "101 unasked, in chunks": SWITCH + b"Transfer-Encoding: chunked\r\n" + OK_CHUNKS,
    "101 unasked, and an answer": SWITCH + b"\r\n" + LINE + NO_BODY,
    "101 unasked, without a protocol": b"HTTP/1.1 101 S\r\n\r\n",
    "101 unasked, to h2c": b"HTTP/1.1 101 S\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\nPRI * HTTP/2.0",
    "two equal lengths on 204": b"HTTP/1.1 204 N\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n",
}
# An accepted head, before a body that is refused.
REFUSED_BODIES: dict[str, bytes] = {
    "no chunk size": CHUNKED + b"\r\n\r\nok\r\n0\r\n\r\n",
    "a chunk size that is none": CHUNKED + b"\r\nzz\r\nok\r\n0\r\n\r\n",
    "a chunk size that is none, without end": CHUNKED + b"\r\nzz",
    "a chunk size in C": CHUNKED + b"\r\n0x2\r\nok\r\n0\r\n\r\n",
    "a signed chunk size": CHUNKED + b"\r\n+2\r\nok\r\n0\r\n\r\n",
    "a negative chunk size": CHUNKED + b"\r\n-2\r\nok\r\n0\r\n\r\n",
    "a chunk size with a space before": CHUNKED + b"\r\n 2\r\nok\r\n0\r\n\r\n",
    "a chunk size with a space behind": CHUNKED + b"\r\n2 \r\nok\r\n0\r\n\r\n",
    "a chunk size of 17 digits": CHUNKED + b"\r\n00000000000000002\r\nok\r\n0\r\n\r\n",
    "a chunk size beyond 64 bits": CHUNKED + b"\r\n10000000000000002\r\nok\r\n0\r\n\r\n",
    "a chunk that is longer": CHUNKED + b"\r\n2\r\nokay\r\n0\r\n\r\n",
    "a chunk without end": CHUNKED + b"\r\n2\r\nok0\r\n\r\n",
    "a chunk that ends in a bare LF": CHUNKED + b"\r\n2\r\nok\n0\r\n\r\n",
    "a chunk line that ends in a bare LF": CHUNKED + b"\r\n2\nok\r\n0\r\n\r\n",
    "a bare LF in an extension": CHUNKED + b"\r\n2;a\nok\r\n0\r\n\r\n",
    "a bare CR in an extension": CHUNKED + b"\r\n2;a\rb\r\nok\r\n0\r\n\r\n",
    "NUL in an extension": CHUNKED + b"\r\n2;\0\r\nok\r\n0\r\n\r\n",
    "an extension of 70,000 bytes": CHUNKED + b"\r\n2;" + b"x" * 70_000 + b"\r\nok\r\n0\r\n\r\n",
    "a trailer without colon": CHUNKED + b"\r\n2\r\nok\r\n0\r\nX-Odd\r\n\r\n",
    "a folded trailer": CHUNKED + b"\r\n2\r\nok\r\n0\r\nX: a\r\n b\r\n\r\n",
    "NUL in a trailer": CHUNKED + b"\r\n2\r\nok\r\n0\r\nX: \0\r\n\r\n",
    "a bare LF in a trailer": CHUNKED + b"\r\n2\r\nok\r\n0\r\nX: a\nY: b\r\n\r\n",
    "a trailer of 70,000 bytes": CHUNKED + b"\r\n2\r\nok\r\n0\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
    "trailers of 70,000 bytes": CHUNKED + b"\r\n2\r\nok\r\n0\r\n" + b"A: b\r\n" * 11_700 + b"\r\n",
    "an answer for a trailer": CHUNKED + b"\r\n2\r\nok\r\n0\r\n" + LINE + NO_BODY,
}
REFUSED = REFUSED_HEADS | REFUSED_BODIES
# Odd, but there is one way to read it: status and body.
ACCEPTED: dict[str, tuple[bytes, int, bytes]] = {
    "no reason": (b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok", 200, b"ok"),
    "status 599": (b"HTTP/1.1 599 Odd\r\nContent-Length: 2\r\n\r\nok", 599, b"ok"),
    "a head of 65,536 bytes": (filled(MAX_HEAD_BYTES), 200, b"ok"),
    "white space about the length": (LINE + b"Content-Length: \t2 \t\r\n\r\nok", 200, b"ok"),
    "an interim answer without a body": (
        b"HTTP/1.1 103 E\r\nContent-Length: 0\r\n\r\n" + LINE + b"Content-Length: 2\r\n\r\nok",
        200,
        b"ok",
    ),
    "chunk extensions": (CHUNKED + b'\r\n2;a=1;b="c d"\r\nok\r\n000;x\r\n\r\n', 200, b"ok"),
    "trailers": (CHUNKED + b"\r\n1\r\no\r\n01\r\nk\r\n0\r\nX: a\r\nY:\r\n\r\n", 200, b"ok"),
    "bytes behind": (LINE + b"Content-Length: 2\r\n\r\nokay", 200, b"ok"),
    "an answer behind": (CHUNKED + OK_CHUNKS + LINE + NO_BODY, 200, b"ok"),
    "204 with a body": (b"HTTP/1.1 204 N\r\nContent-Length: 2\r\n\r\nok", 204, b""),
    "204 in chunks": (b"HTTP/1.1 204 N\r\nTransfer-Encoding: chunked\r\n" + OK_CHUNKS, 204, b""),
    "304 with a body": (b"HTTP/1.1 304 N\r\nContent-Length: 2\r\n\r\nok", 304, b""),
}


def verdict(raw: bytes, *cuts: int, head_only: bool = False) -> tuple[AnswerState, int | None, bytes]:
    """How an answer ends that comes in packets cut at these places: its state, status and body."""
    parser = AnswerParser(head_only, None)
    body = b""
    for start, end in zip((0, *cuts), (*cuts, len(raw)), strict=True):
        parser.feed(raw[start:end])
        if parser.head is not None:
            assert parser.state is not AnswerState.FAILED
    body += parser.take()
    return parser.state, parser.head.status if parser.head else None, body


def places(raw: bytes) -> range | list[int]:
    """Where an answer is cut: everywhere, or, in a long one, about its ends and in its midst."""
    if len(raw) < 1_000:
        return range(1, len(raw))
    near = {1, 2, 17, 18, 19, 20, 65_535, 65_536, 65_537, len(raw) // 2, len(raw) // 2 + 1}
    return sorted(near | set(range(len(raw) - 40, len(raw))))


@pytest.mark.parametrize("name", REFUSED)
def test_an_answer_that_cannot_be_trusted_fails_wherever_packets_split_it(name: str) -> None:
    raw = REFUSED[name]
    assert verdict(raw) == (AnswerState.FAILED, None, b"")
    for cut in places(raw):
        assert verdict(raw, cut) == (AnswerState.FAILED, None, b""), cut
    assert verdict(raw, *range(1, len(raw)))[0] is AnswerState.FAILED


@pytest.mark.parametrize("name", REFUSED_HEADS)
def test_of_a_refused_head_nothing_is_ever_shown(name: str) -> None:
    raw = REFUSED_HEADS[name]
    parser = AnswerParser(False, None)
    for at in range(len(raw)):
        parser.feed(raw[at : at + 1])
        assert parser.head is None
        assert not parser.pieces
    assert parser.state is AnswerState.FAILED


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_odd_answer_with_one_reading_is_the_same_wherever_packets_split_it(name: str) -> None:
    raw, status, body = ACCEPTED[name]
    expected = AnswerState.COMPLETE, status, body
    assert verdict(raw) == expected
    for cut in places(raw):
        assert verdict(raw, cut) == expected, cut
    assert verdict(raw, *range(1, len(raw))) == expected


@pytest.mark.parametrize("name", REFUSED_HEADS)
def test_the_answer_to_a_head_request_is_judged_by_its_head_alike(name: str) -> None:
    raw = REFUSED_HEADS[name]
    found = verdict(raw, head_only=True)
    assert {verdict(raw, cut, head_only=True) for cut in places(raw)} == {found}
    # A HEAD's answer has no body, so that its coding says nothing.
    assert found[0] is (
        AnswerState.COMPLETE if b"Encoding" in raw and found[1] == 200 else AnswerState.FAILED
    )


ATOMS = [
    b"HTTP/1.1 200 OK\r\n",
    b"HTTP/1.1 204 No\r\n",
    b"HTTP/1.1 103 E\r\n",
    b"HTTP/1.1 101 S\r\n",
    b"HTTP/1.0 200 OK\r\n",
    b"Content-Length: 2\r\n",
    b"Content-Length: 0\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: gzip\r\n",
    b"Upgrade: websocket\r\n",
    b"Connection: upgrade\r\n",
    b"X: y\r\n",
    b"\r\n",
    b"2\r\nok\r\n",
    b"0\r\n\r\n",
    b"ok",
    b"\r",
    b"\n",
    b"\0",
    b"H",
]


@given(
    st.lists(st.sampled_from(ATOMS), min_size=1, max_size=12).map(b"".join),
    st.lists(st.integers(1, 200), max_size=4),
    st.booleans(),
)
def test_no_answer_means_two_things_in_two_splits(raw: bytes, cuts: list[int], head_only: bool) -> None:
    raw = LINE + raw
    somewhere = sorted({cut for cut in cuts if cut < len(raw)})
    assert verdict(raw, *somewhere, head_only=head_only) == verdict(raw, head_only=head_only)


def test_a_state_that_ends_an_answer_is_never_left() -> None:
    for raw, state in (
        (REFUSED["chunked twice"], AnswerState.FAILED),
        (LINE + NO_BODY, AnswerState.COMPLETE),
    ):
        parser = AnswerParser(False, None)
        parser.feed(raw)
        for more in (LINE + NO_BODY, b"x", b"HTTP/2.0 200 OK\r\n\r\n"):
            assert parser.feed(more) is state
            assert parser.end() is state
            assert not parser.reusable


# Through the sidecar ------------------------------------------------------------------------------------


def packets(raw: bytes, *cuts: int) -> list[bytes | float]:
    """The pieces of an answer, with pauses in which they arrive one by one."""
    sent: list[bytes | float] = []
    for start, end in zip((0, *cuts), (*cuts, len(raw)), strict=True):
        sent += [raw[start:end], 0.003]
    return sent[:-1]


def cuts_of(raw: bytes) -> list[tuple[int, ...]]:
    """In one packet, and cut behind the head's last byte but one, behind the head, and before the end."""
    whole_head = raw.find(b"\r\n\r\n") + 4
    return [(), (whole_head - 1,), (whole_head,), (len(raw) - 1,)]


@pytest.mark.parametrize("name", REFUSED)
async def test_a_gated_answer_that_cannot_be_trusted_is_unknown_at_once(
    house: House, backend: Backend, name: str
) -> None:
    raw = REFUSED[name]
    scope = await house.issue(action="failover", max_attempts=10, max_cost_usd=10)
    for cuts in cuts_of(raw):
        backend.script = sends(*packets(raw, *cuts))
        async with asyncio.timeout(5):  # of the 30 s that an answer may take
            answer = await house.execute(scope)
        assert (answer.status, answer.json()["error"]) == (502, "upstream_failed"), cuts
        found = await house.record(answer.json()["decision_id"])
        assert found["execution"]["status"] == "unknown"
    assert house.sidecar.gate.in_flight == 0
    assert (await house.scope(scope))["attempts_used"] == len(backend.seen) == len(cuts_of(raw))
    assert backend.connections == len(cuts_of(raw))  # none was used again
    backend.script = replies()
    assert (await house.execute(scope)).status == 200


@pytest.mark.parametrize("name", REFUSED_HEADS)
async def test_no_refused_head_passes_through(house: House, backend: Backend, name: str) -> None:
    raw = REFUSED_HEADS[name]
    for cuts in cuts_of(raw):
        backend.script = sends(*packets(raw, *cuts))
        answer = await house.data("GET", "/elsewhere")
        assert (answer.status, answer.json()["error"]) == (502, "upstream_failed"), cuts
    assert house.sidecar.passing.under_way == 0


@pytest.mark.parametrize("name", REFUSED_BODIES)
async def test_a_body_that_cannot_be_trusted_is_refused_or_cut_on_its_way_through(
    house: House, backend: Backend, name: str
) -> None:
    raw = REFUSED_BODIES[name]
    for cuts in cuts_of(raw):
        backend.script = sends(*packets(raw, *cuts))
        answer = await house.data("GET", "/elsewhere")
        if answer.status == 200:  # its head was shown before its body came
            assert not answer.whole, cuts
        else:
            assert (answer.status, answer.json()["error"]) == (502, "upstream_failed"), cuts
    assert house.sidecar.passing.under_way == 0


@pytest.mark.parametrize("name", ["with a length", "in chunks", "without a protocol", "to h2c"])
async def test_a_101_that_is_not_the_one_offered_reaches_no_client(
    house: House, backend: Backend, name: str
) -> None:
    backend.script = sends(REFUSED_HEADS[f"101 unasked, {name}"])
    offer = [("Connection", "Upgrade"), ("Upgrade", "websocket")]
    answer = await house.data("GET", "/ws", offer)
    assert (answer.status, answer.json()["error"]) == (502, "upstream_failed")


async def test_an_answer_of_interim_heads_without_end_is_cut_off(house: House, backend: Backend) -> None:
    async def script(request: Message, writer: asyncio.StreamWriter) -> None:
        while not writer.is_closing():
            writer.write(b"HTTP/1.1 103 E\r\nLink: x\r\n\r\n" * 100)
            await writer.drain()
            await asyncio.sleep(0)  # the sidecar runs in the same loop

    backend.script = script
    answer = await house.execute(await house.issue())
    assert (answer.status, answer.json()["error"]) == (502, "upstream_failed")
    assert (await house.ended(answer.json()["decision_id"]))["status"] == "unknown"


async def test_a_flood_of_refused_answers_leaks_no_place_in_flight(house: House, backend: Backend) -> None:
    scope = await house.issue(max_attempts=10)
    kind, body = house.execution(scope)
    backend.script = sends(REFUSED["chunked twice"])
    answers = await asyncio.gather(
        *(ask(house.sidecar.data_address, "POST", EXECUTE, kind, body) for _ in range(50))
    )
    assert Counter(answer.status for answer in answers) == {502: 10, 400: 40}
    assert house.sidecar.gate.in_flight == 0
    assert house.sidecar.upstream.in_use == 0

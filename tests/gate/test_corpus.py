"""The corpus through a sidecar to the most careless backend: nothing gets through, nothing is mishandled.

The backend reads each request that arrives in all the ways of tests/lenient.py and counts what it would
execute. A request *gets through* if it would execute there without an admission in the log, or with other
facts than were admitted. It is *mishandled* if it is answered otherwise than the corpus owes it, not at all,
or if what arrives is not what was sent.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests import lenient
from tests.client import Message, connect, read_message
from tests.corpus import Case, cases, counted, end_to_end, is_own
from tests.support import House, Open

CASES = list(cases())
ANSWER_SECONDS = 5.0  # more than the body_timeout_seconds of this sidecar, which ends what is not finished
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
HEADER_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[ \t]?[^\x00-\x08\x0a-\x1f\x7f]*")
ROUTES = [{"path": "**/recovery/execute"}]


@dataclass
class Arrived:
    """One request as it stood on the wire behind the gate."""

    head: bytes
    body: bytes

    @property
    def lines(self) -> list[bytes]:
        return self.head.removesuffix(b"\r\n\r\n").split(b"\r\n")

    @property
    def request_line(self) -> list[bytes]:
        return self.lines[0].split(b" ")

    @property
    def pairs(self) -> list[tuple[bytes, bytes]]:
        return [(name, value.strip()) for name, _, value in (line.partition(b":") for line in self.lines[1:])]

    def value(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.pairs if key.lower() == name), None)

    def faults(self) -> list[str]:
        """Why another program could see another request in these bytes."""
        found = [f"a header line {line!r}" for line in self.lines[1:] if not HEADER_LINE.fullmatch(line)]
        framing = [name.lower() for name, _ in self.pairs if b"content-length" in name.lower()]
        framing += [name.lower() for name, _ in self.pairs if b"transfer-encoding" in name.lower()]
        if len(framing) > 1:
            found.append(f"framed by {framing}")
        if len(self.request_line) != 3 or self.request_line[2] != b"HTTP/1.1":
            found.append(f"a request line {self.lines[0]!r}")
        return found


@dataclass
class Careless:
    """Keeps every request that arrives, and answers 200 to each."""

    seen: list[Arrived] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError as exc:
                if exc.partial:
                    self.broken.append(f"a request that is cut: {exc.partial!r}")
                return
            arrived = Arrived(head, b"")
            if arrived.value(b"transfer-encoding") is not None:
                while size := int(await reader.readline(), 16):
                    arrived.body += await reader.readexactly(size)
                    await reader.readexactly(2)
                await reader.readline()
            else:
                arrived.body = await reader.readexactly(int(arrived.value(b"content-length") or 0))
            self.seen.append(arrived)
            writer.write(ANSWER[:-2] if arrived.request_line[0] == b"HEAD" else ANSWER)


async def converse(house: House, raw: bytes, *, bodiless: bool) -> list[Message]:
    """The answers to what a client sends on one connection, up to its end."""
    reader, writer = await connect(house.sidecar.data_address)
    answers = []
    try:
        writer.write(raw)
        async with asyncio.timeout(ANSWER_SECONDS):
            first = await read_message(reader, bodiless=bodiless)
        if first is not None:
            answers.append(first)
            # What else was in these bytes, if it was a request, is answered before this one.
            writer.write(b"GET /last HTTP/1.1\r\nHost: sidecar.test\r\nConnection: close\r\n\r\n")
            async with asyncio.timeout(ANSWER_SECONDS):
                while (more := await read_message(reader)) is not None:
                    answers.append(more)
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.close()
    return answers


def verdict(case: Case, answers: list[Message], arrived: list[Arrived]) -> set[str]:
    """The names of what became of a request, by which the corpus may call it."""
    if arrived:
        recorded = arrived[0].value(b"scopegate-decision-id") is not None
        return {"judged" if recorded else "passes"}
    if not answers:
        return {"closed"}
    answer = answers[0]
    found = {"own"} if answer.status not in (400, 403, 415, 421, 502, 503, 504) else set()
    if answer.status == 400:
        found.add("closed")
    if case.made is not None and case.made.method == "HEAD":
        return found | set(case.owed) if answer.status in (400, 405) else found
    try:
        found.add(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        found.add(f"{answer.status} {answer.body[:60]!r}")
    return found


def changed(case: Case, arrived: Arrived, scope_id: str, *, judged: bool) -> str | None:
    """What of a request is not as it was sent."""
    made = case.made
    if made is None:
        return None  # its bytes were no canonical request, so what arrives is another spelling of it
    if arrived.request_line[:2] != [made.method.encode("latin-1"), made.target.encode("latin-1")]:
        return f"the request line is {arrived.lines[0]!r}"
    if arrived.body != made.body_bytes(scope_id):
        return f"the body is {arrived.body!r}"
    sent = end_to_end(made.lines)
    found = end_to_end([line.decode("latin-1") for line in arrived.lines[1:]])
    if judged:
        added = {"x-request-id", "traceparent"} - {name.lower() for name, _ in sent}
        sent = [(name, value) for name, value in sent if not is_own(name)]
        found = [pair for pair in found if not is_own(pair[0]) and pair[0].lower() not in added]
    sent = [(name, value) for name, value in sent if name.lower() != "expect"]
    found = [(name, value) for name, value in found if name.lower() != "expect"]
    return None if sent == found else f"the headers are {found}, not {sent}"


async def unadmitted(house: House, arrived: Arrived) -> str | None:
    """Why an execution at the backend is none that was admitted; None if it was, with these very facts."""
    method, target = arrived.request_line[:2]
    if lenient.executes(method, target, arrived.pairs) is None:
        return None
    decision_id = arrived.value(b"scopegate-decision-id")
    if decision_id is None:
        return "it executes without a decision"
    record = await house.record(decision_id.decode())
    if record["event"] != "admitted":
        return f"it executes on a record of {record['event']}"
    admitted: dict[tuple[str, ...], Any] = {
        ("scope_id",): record["scope_id"],
        ("incident_id",): record["incident_id"],
        ("action",): record["action"],
    }
    for fact, values in lenient.facts(arrived.body).items():
        if values and values != [admitted.get(fact, values[0])]:
            return f"{'/'.join(fact)} is read as {values}, and {admitted.get(fact)} was admitted"
    return None


async def test_the_corpus_gets_through_nowhere_and_is_handled_as_it_is_owed(open_house: Open) -> None:
    house = await open_house(
        gate={"routes": ROUTES, "body_timeout_seconds": 1, "head_timeout_seconds": 1},
        upstream={"response_timeout_seconds": 2},
        scopes={"limits": {"max_attempts": 100_000, "ttl_seconds": 3600, "max_cost_usd": 100}},
    )
    careless = Careless()
    house.backend.instead = careless.serve
    scope_id = (await house.issue(max_attempts=100_000, ttl_seconds=3600))["scope_id"]
    through, mishandled, verdicts = [], [], Counter[str]()
    for case in CASES:
        before = len(careless.seen)
        head = case.made is not None and case.made.method == "HEAD"
        answers = await converse(house, case.bytes_for(scope_id), bodiless=head)
        arrived = [each for each in careless.seen[before:] if each.request_line[1] != b"/last"]
        for each in arrived:
            if reason := await unadmitted(house, each):
                through.append(f"{case}\n    {reason}")
            mishandled += [f"{case}\n    arrives with {fault}" for fault in each.faults()]
        found = verdict(case, answers, arrived)
        verdicts.update(found & set(case.owed) or found)
        if not found & set(case.owed):
            mishandled.append(f"{case}\n    owed {case.owed}, found {found}")
        elif arrived and (change := changed(case, arrived[0], scope_id, judged="judged" in found)):
            mishandled.append(f"{case}\n    {change}")
        elif len(arrived) > 1:
            mishandled.append(f"{case}\n    {len(arrived)} requests arrive")
    mishandled += careless.broken
    print(f"{len(CASES)} requests: {counted(verdicts)}; {len(through)} through, {len(mishandled)} mishandled")
    if through or mishandled:
        pytest.fail("\n".join(["through:", *through, "mishandled:", *mishandled]), pytrace=False)


# The corpus itself --------------------------------------------------------------------------------------


def test_the_corpus_is_as_large_as_promised_and_says_nothing_twice() -> None:
    assert len(CASES) >= 800
    assert sum(case.owed == ("passes",) for case in CASES) >= 100
    sent = Counter(case.bytes_for("SCOPE") for case in CASES)
    assert [request for request, times in sent.items() if times > 1] == []


@pytest.mark.parametrize("file", ["targets", "methods"])
def test_each_target_that_is_refused_would_execute_at_the_careless_backend(file: str) -> None:
    idle = []
    for case in CASES:
        if case.file != file or case.made is None or "looking" in case.kind or "passes" in case.owed:
            continue
        if not {"ambiguous_path", "override_refused"} & set(case.owed):
            continue
        pairs = [
            (name.encode("latin-1"), value.encode("latin-1")) for name, value in end_to_end(case.made.lines)
        ]
        method, target = case.made.method.encode("latin-1"), case.made.target.encode("latin-1")
        if method in (b"GET", b"HEAD", b"OPTIONS", b"DELETE", b"PUT"):
            method = b"POST"
        if lenient.executes(method, target, pairs) is None:
            idle.append(str(case))
    assert idle == []


def test_what_passes_would_not_execute_at_the_careless_backend() -> None:
    executed = []
    for case in CASES:
        if case.owed == ("passes",) and case.made is not None:
            pairs = [
                (name.encode("latin-1"), value.encode("latin-1"))
                for name, value in end_to_end(case.made.lines)
            ]
            if lenient.executes(case.made.method.encode(), case.made.target.encode("latin-1"), pairs):
                executed.append(str(case))
    assert executed == []


@pytest.mark.parametrize(
    ("body", "fact", "values"),
    [
        ('{"action": "a", "action": "b"}', ("action",), ["a", "b"]),
        ('{"action": "a", " Act\\u200bion\\u0000x": "b"}', ("action",), ["a", "b"]),
        ('{"parameters": {"target_agents": ["a"]}}', ("parameters", "target_agents"), [["a"]]),
        ('{"actions": "b", "other": {"action": "a"}}', ("action",), []),
    ],
)
def test_the_careless_backend_reads_a_body_in_every_way(
    body: str, fact: tuple[str, ...], values: list[object]
) -> None:
    json.loads(body)
    assert lenient.facts(body.encode())[fact] == values

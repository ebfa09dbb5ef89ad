"""What a connection can do before it is a request: a flood takes no other listener down, and what cannot be
parsed is never quoted."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from aiohttp import http_exceptions

from sidecar import serve
from sidecar.settings.addresses import Address, Listen
from sidecar.web.serving import listener as listeners
from sidecar.web.serving.connections import UNKNOWN_FAULT, fault
from sidecar.web.serving.listener import ADMIN_CONNECTIONS, DATA_CONNECTIONS, OPS_CONNECTIONS, connections
from tests.acceptance.conftest import (
    Backend,
    Program,
    ask,
    ask_json,
    execution,
    write_configuration,
)
from tests.certificates import Authority
from tests.client import BlockingConnection, connect, read_message, send
from tests.support import EXECUTE, SCOPE, House, Open, eventually

FEW_FILES = 120
FLOOD = 300


# How many -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "upstream", "admin", "data"),
    [
        (8192, 512, 1024, 6464),
        (2048, 512, 512, 832),
        (1024, 64, 256, 512),
        (120, 512, ADMIN_CONNECTIONS[0], DATA_CONNECTIONS[0]),
        (0, 1, ADMIN_CONNECTIONS[0], DATA_CONNECTIONS[0]),
        (1 << 30, 512, ADMIN_CONNECTIONS[1], DATA_CONNECTIONS[1]),
    ],
)
def test_data_gets_what_backend_admin_ops_and_store_leave(
    files: int, upstream: int, admin: int, data: int
) -> None:
    assert connections(files, upstream) == {"data": data, "admin": admin, "ops": OPS_CONNECTIONS}


def under(limit: str) -> list[str]:
    """Starts a program with a limit, as `ulimit` takes it."""
    return ["sh", "-c", f'ulimit {limit} && exec "$@"', "sh"]


def files_of(program: Program) -> tuple[int, int]:
    """The soft and the hard limit of a process, as Linux tells them."""
    for line in Path(f"/proc/{program.pid}/limits").read_text().splitlines():
        if line.startswith("Max open files"):
            soft, hard = line.split()[3:5]
            return int(soft), int(hard)
    raise AssertionError("no limit is told")


linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells and sets limits of a process")


@linux
def test_run_allows_itself_all_the_files_that_it_may(tmp_path: Path) -> None:
    config = write_configuration(tmp_path, ("127.0.0.1", 9))
    with Program(config, through=under("-S -n 100")) as program:
        soft, hard = files_of(program)
        assert soft == hard > 100


def test_a_limit_that_is_too_low_for_the_gate_is_warned_about(tmp_path: Path) -> None:
    config = write_configuration(tmp_path, ("127.0.0.1", 9))
    with Program(config, through=under(f"-n {FEW_FILES}")) as program:
        (warning,) = [line for line in program.log_lines() if line["level"] == "WARNING"]
        assert warning["message"].startswith("the file limit leaves the data listener fewer connections than")
        assert (warning["limit"], warning["connections"]) == (FEW_FILES, DATA_CONNECTIONS[0])


# Floods -------------------------------------------------------------------------------------------------


def flood(stack: ExitStack, address: tuple[str, int], count: int = FLOOD) -> list[socket.socket]:
    """Connections on which nothing is said. Some are turned away before they know that they are connected."""
    held = []
    for _ in range(count):
        with suppress(ConnectionResetError):
            held.append(stack.enter_context(socket.create_connection(address, timeout=5)))
    return held


def still_connected(held: list[socket.socket]) -> int:
    count = 0
    for one in held:
        one.setblocking(False)
        try:
            one.recv(1)
        except BlockingIOError:
            count += 1
        except ConnectionResetError:
            pass
    return count


def answers_soon(address: tuple[str, int], target: str) -> None:
    begun = time.monotonic()
    assert ask(address, "GET", target).status == 200
    assert time.monotonic() - begun < 1, target


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "tls"])
def test_a_flood_beyond_the_file_limit_is_turned_away_and_all_else_goes_on(tmp_path: Path, kind: str) -> None:
    data: dict[str, Any] = {}
    authority = Authority(tmp_path)
    if kind == "tls":
        data["tls"] = authority.issue("served").settings()

    def opened(program: Program) -> BlockingConnection:
        return BlockingConnection(program.data, authority.client() if kind == "tls" else None)

    with (
        Backend() as backend,
        Program(
            write_configuration(tmp_path, backend.address, data=data), through=under(f"-n {FEW_FILES}")
        ) as program,
        ExitStack() as stack,
    ):
        steady = opened(program)
        stack.callback(steady.close)
        wanted = {"incident_id": "inc-1", "action": "retry_agent", "intent": "a test", "max_attempts": 9}
        scope_id = steady.ask_json("POST", SCOPE, wanted).json()["scope_id"]

        def executes(connection: BlockingConnection) -> bool:
            return connection.ask_json("POST", EXECUTE, execution(scope_id)).status == 200

        assert executes(steady)
        held = flood(stack, program.data)
        for _ in range(5):
            answers_soon(program.admin, "/api/v1/status")
            answers_soon(program.ops, "/health/ready")
            answers_soon(program.ops, "/metrics")
            assert executes(steady)
        assert 0 < still_connected(held) <= DATA_CONNECTIONS[0] - 1
        late = opened(program)
        stack.callback(late.close)
        with pytest.raises(OSError, match=r"(?i)reset|closed|eof|broken pipe|without response|not connected"):
            executes(late)

        lines = program.log_lines()
        assert len(program.log().splitlines()) == len(lines) < 200, "one line each, and no traceback"
        (told,) = [line for line in lines if line["message"] == "too many connections"]
        assert (told["level"], told["listener"], told["limit"]) == ("WARNING", "data", DATA_CONNECTIONS[0])
        assert [line for line in lines if line["level"] == "ERROR"] == []

        for one in held:
            one.close()

        def comes_through() -> bool:
            anew = opened(program)
            try:
                return executes(anew)
            except OSError:
                return False
            finally:
                anew.close()

        program.until("takes connections again", comes_through)
        assert executes(steady)
        assert program.stop() == 0


@pytest.mark.slow
def test_places_come_back_when_those_who_say_nothing_run_out_of_time(tmp_path: Path) -> None:
    config = write_configuration(
        tmp_path,
        ("127.0.0.1", 9),
        data={"tls": Authority(tmp_path).issue("served").settings()},
        gate={"head_timeout_seconds": 0.5},
    )
    with (
        Program(config, through=under(f"-n {FEW_FILES}")) as program,
        ExitStack() as stack,
    ):
        held: list[socket.socket] = []

        def few_are_left() -> bool:
            return still_connected(held) <= DATA_CONNECTIONS[0]

        def nobody_is_left() -> bool:
            return still_connected(held) == 0

        for _ in range(3):  # each time as many as the first time
            held = flood(stack, program.data)
            assert still_connected(held) > 0
            program.until("turns the rest away", few_are_left)
            program.until("lets go", nobody_is_left)
        assert len([line for line in program.log_lines() if line["message"] == "too many connections"]) == 1


@pytest.mark.slow
@linux
def test_descriptors_that_run_out_all_the_same_are_no_flood_of_lines(tmp_path: Path) -> None:
    with (
        Backend() as backend,
        Program(write_configuration(tmp_path, backend.address)) as program,
        ExitStack() as stack,
    ):
        before = files_of(program)
        resource.prlimit(program.pid, resource.RLIMIT_NOFILE, (40, before[1]))
        flood(stack, program.data, 100)
        time.sleep(2.5)
        complaints = [line for line in program.log_lines() if line["message"] == "cannot accept connections"]
        assert 2 <= len(complaints) <= 4
        assert {(line["listener"], line["cause"]) for line in complaints} == {("data", "Too many open files")}
        assert "Traceback" not in program.log()
        assert len(program.log().splitlines()) < 50
        resource.prlimit(program.pid, resource.RLIMIT_NOFILE, before)
        answers_soon(program.ops, "/health/ready")
        assert ask_json(program.data, "POST", "/agents", {}).status == 200


def address_of(house: House, listener: str) -> Address:
    address: Address = getattr(house.sidecar, f"{listener}_address")
    return address


@pytest.mark.slow
@pytest.mark.parametrize(("flooded", "other"), [("admin", "ops"), ("ops", "admin")])
async def test_a_flood_of_admin_or_ops_takes_nothing_from_the_others(
    open_house: Open,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    flooded: str,
    other: str,
) -> None:
    # A busy machine opens so few connections long before the first of them runs out of time.
    monkeypatch.setattr(listeners, "ADMIN_CONNECTIONS", (128, 128))
    monkeypatch.setattr(serve, "HEAD_SECONDS", 4.0)
    house = await open_house()
    address, ask_other = address_of(house, flooded), address_of(house, other)
    writers = []
    most = house.sidecar.connections[flooded]
    for _ in range(most + 20):
        with suppress(ConnectionResetError):
            writers.append((await connect(address))[1])
    target = {"admin": "/api/v1/status", "ops": "/health/ready"}

    async def said_by(where: Address, target: str) -> int | None:
        try:
            reader, writer = await connect(where)
        except ConnectionError:
            return None
        try:
            writer.write(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            answer = await read_message(reader)
            return answer.status if answer else None
        except ConnectionError:
            return None
        finally:
            writer.close()

    assert await said_by(address, target[flooded]) is None
    assert await said_by(ask_other, target[other]) == 200
    assert (await house.execute(await house.issue())).status == 200
    (told,) = [record for record in caplog.records if record.message == "too many connections"]
    assert (vars(told)["listener"], vars(told)["limit"]) == (flooded, most)

    # A connection without a request keeps its place only for HEAD_SECONDS.
    async def served() -> bool:
        return await said_by(address, target[flooded]) == 200

    await eventually(served, seconds=20)
    for writer in writers:
        writer.close()


async def test_a_short_queue_of_accepts_loses_nobody(house: House) -> None:
    """More at once than are accepted in a row, all of them waiting in the kernel."""
    address = house.sidecar.data_address
    assert isinstance(address, Listen)
    at_once = []
    for _ in range(150):
        one = socket.socket()
        one.setblocking(False)
        one.connect_ex((address.host, address.port))  # nothing is awaited: nobody is accepted meanwhile
        at_once.append(one)
    answers = []
    for one in at_once:
        reader, writer = await asyncio.open_connection(sock=one)
        writer.write(b"GET /agents HTTP/1.1\r\nHost: x\r\n\r\n")
        answers.append((reader, writer))
    for reader, writer in answers:
        answer = await read_message(reader)
        assert answer is not None
        assert answer.status == 200
        writer.close()


# What cannot be parsed ----------------------------------------------------------------------------------

HEAD = b"GET /health/live HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /upload HTTP/1.1\r\nHost: x\r\n"
UNPARSABLE = {
    "header": HEAD + b"Authorization: Bearer SECRET\x01\r\n\r\n",
    "name": HEAD + b"X-SECRET\x01: 1\r\n\r\n",
    "long": HEAD + b"Authorization: Bearer SECRET" + b"0" * 40_000 + b"\r\n\r\n",
    "long target": b"GET /SECRET" + b"0" * 40_000 + b" HTTP/1.1\r\n\r\n",
    "url": b"GET http://h:99999999/x?token=SECRET HTTP/1.1\r\nHost: x\r\n\r\n",
    "connect": b"CONNECT SECRET:99999999 HTTP/1.1\r\nHost: x\r\n\r\n",
    "method": b"SECRET\x01 / HTTP/1.1\r\n\r\n",
    "version": b"GET /SECRET HTTP/SECRET\r\nHost: x\r\n\r\n",
    "length": POST + b"Content-Length: SECRET\r\n\r\n",
    "hosts": b"GET /?SECRET HTTP/1.1\r\nHost: SECRET\r\nHost: SECRET\r\n\r\n",
    "key": HEAD + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key1: SECRET\r\n\r\n",
    "handshake": b"\x16\x03\x01SECRET\r\n\r\n",
}


@pytest.fixture
def everything(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """All that was logged, at any level and with its fields and tracebacks."""
    caplog.set_level(logging.DEBUG)
    formatter = logging.Formatter("%(name)s %(message)s")

    def so_far() -> str:
        return "\n".join(
            f"{formatter.format(record)} { ({**vars(record), 'exc_text': None}) }"
            for record in caplog.records
        )

    return so_far


@pytest.mark.parametrize("listener", ["data", "admin", "ops"])
@pytest.mark.parametrize("what", UNPARSABLE)
async def test_what_cannot_be_parsed_is_refused_and_quoted_nowhere(
    house: House, everything: Callable[[], str], listener: str, what: str
) -> None:
    answer = await send(address_of(house, listener), UNPARSABLE[what])
    assert (answer.status, answer.header("Content-Type")) == (400, "application/problem+json")
    assert answer.json()["error"] == "invalid_request"
    assert answer.json()["message"].startswith("This is not HTTP as it should be: ")
    assert UNKNOWN_FAULT not in answer.json()["message"]
    assert "SECRET" not in f"{answer.first} {answer.raw_headers} {answer.body!r}"
    logged = everything()
    assert "a request could not be parsed" in logged
    assert "SECRET" not in logged
    assert "Traceback" not in logged


@pytest.mark.parametrize("listener", ["data", "admin", "ops"])
async def test_a_body_that_breaks_off_in_its_chunks_is_quoted_nowhere(
    house: House, everything: Callable[[], str], listener: str
) -> None:
    reader, writer = await connect(address_of(house, listener))
    writer.write(POST + b"Transfer-Encoding: chunked\r\n\r\n")
    await asyncio.sleep(0.05)  # the request is known to be one by now
    writer.write(b"SECRET\r\n")
    with suppress(TimeoutError):  # what passes through waits for the rest of the body
        assert b"SECRET" not in await asyncio.wait_for(reader.read(), 1.5)
    writer.close()
    await asyncio.sleep(0.05)
    logged = everything()
    assert "SECRET" not in logged
    assert "Traceback" not in logged


@pytest.mark.parametrize(
    "exc",
    [
        http_exceptions.LineTooLong(b"SECRET", 8190),
        http_exceptions.InvalidHeader(b"SECRET"),
        http_exceptions.BadHttpMethod("SECRET"),
        http_exceptions.BadStatusLine("SECRET"),
        http_exceptions.InvalidURLError("SECRET"),
        http_exceptions.TransferEncodingError("SECRET"),
        http_exceptions.ContentLengthError("SECRET"),
        http_exceptions.BadHttpMessage("SECRET"),
    ],
)
def test_every_fault_of_a_request_has_words_of_our_own(exc: http_exceptions.HttpProcessingError) -> None:
    assert fault(exc) not in ("", UNKNOWN_FAULT)
    assert "SECRET" not in fault(exc)


async def test_what_aiohttp_logs_by_itself_quotes_no_request_either(
    house: House, everything: Callable[[], str]
) -> None:
    theirs = logging.getLogger("aiohttp.server")
    try:
        try:
            raise http_exceptions.InvalidHeader(b"SECRET")
        except http_exceptions.InvalidHeader as exc:
            raise RuntimeError("after that") from exc
    except RuntimeError:
        theirs.exception("Error handling request")
    try:
        raise RuntimeError("of another kind")
    except RuntimeError:
        theirs.exception("Error handling request")
    assert "SECRET" not in everything()
    assert everything().count("Traceback") == 1, "what quotes nothing is told whole"

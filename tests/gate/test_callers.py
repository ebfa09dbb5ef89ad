"""Who asks, over real connections: client certificates by real handshakes, and proxies that are trusted."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.policy import PolicySet
from sidecar.core.roles import Holders, Roles
from sidecar.settings.addresses import Listen, SocketFile
from sidecar.web.serving.identity import peer_of
from tests.certificates import Authority, Pair
from tests.client import Message, ask, connect, read_message, request_bytes
from tests.support import POLICIES, SECOND, Clock, House, opened, serving_backend
from tests.tokens import AUDIENCE, ISSUER, RSA_KEY, claims, jwk, key_set, signed

AGENT = "spiffe://prod/agent/restarter"
STATUS = "/api/v1/status"
OBSERVED: PolicySet = replace(
    POLICIES, roles=Roles({"observer": Holders(ids=("spiffe://prod/*", "alice", "gate.test"))})
)

Build = Callable[..., Awaitable[House]]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def pair(authority: Authority) -> Pair:
    return authority.issue("served")


@pytest.fixture
async def build(tmp_path: Path, clock: Clock, authority: Authority) -> AsyncIterator[Build]:
    async with AsyncExitStack() as stack:

        async def build_one(**options: Any) -> House:
            backend = await stack.enter_async_context(serving_backend())
            options = {"policies": OBSERVED, "tls": authority.client(), **options}
            return await stack.enter_async_context(opened(tmp_path, backend, clock=clock, **options))

        yield build_one


def verifying(authority: Authority, pair: Pair, listen: str = "127.0.0.1:0", **more: str) -> dict[str, Any]:
    """A listener that verifies client certificates."""
    return {"listen": listen, "tls": pair.settings(client_ca_file=authority.certificate_file) | more}


EVERYWHERE = {"required": True, "required_on": ["gated", "scopes", "pass"]}


# Client certificates ------------------------------------------------------------------------------------


async def test_where_a_certificate_is_optional_certificates_and_tokens_share_a_listener(
    build: Build, authority: Authority, pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    file = tmp_path / "jwks.json"
    file.write_bytes(key_set(jwk(RSA_KEY, "k1")))
    house = await build(
        data=verifying(authority, pair, client_certificate="optional"),
        auth={
            **EVERYWHERE,
            "mtls": {"id": "uri"},
            "jwt": {"issuer": ISSUER, "audience": AUDIENCE, "jwks": str(file)},
        },
    )
    token = ("Scopegate-Authorization", f"Bearer {signed(claims(house.clock() // SECOND))}")
    agent = authority.client(authority.issue("agent", uris=[AGENT]))
    address = house.sidecar.data_address
    assert (await ask(address, "GET", "/a", tls=agent)).status == 200
    assert (await ask(address, "GET", "/b", [token], tls=authority.client())).status == 200
    assert (await ask(address, "GET", "/c", [token], tls=agent)).status == 200
    nothing = await ask(address, "GET", "/d", tls=authority.client())
    assert (nothing.status, nothing.json()["error"]) == (401, "unauthenticated")
    assert set(nothing.json()["methods"]) == {"jwt", "mtls"}
    # A certificate of another authority is refused, although none is needed.
    stranger = Authority(tmp_path, "stranger").issue("theirs", uris=[AGENT])
    with pytest.raises((OSError, AssertionError)):
        await ask(address, "GET", "/e", [token], tls=authority.client(stranger))
    expired = authority.issue("expired", uris=[AGENT], days=-1)
    with pytest.raises((OSError, AssertionError)):
        await ask(address, "GET", "/f", [token], tls=authority.client(expired))
    assert [request.target for request in house.backend.seen] == ["/a", "/b", "/c"]
    failed = [vars(each)["cause"] for each in caplog.records if each.message == "a TLS handshake failed"]
    assert failed == ["unable to get local issuer certificate", "certificate has expired"]
    page = await house.metrics()
    assert 'scopegate_authenticated_requests_total{method="mtls",principal_kind="service"} 1.0' in page
    assert 'scopegate_authenticated_requests_total{method="jwt",principal_kind="service"} 2.0' in page


@pytest.mark.parametrize("more", [{}, {"client_certificate": "required"}])
async def test_where_a_certificate_is_required_there_is_no_connection_without_one(
    build: Build, authority: Authority, pair: Pair, more: dict[str, str]
) -> None:
    house = await build(data=verifying(authority, pair, **more), auth={"mtls": {"id": "dns"}})
    address = house.sidecar.data_address
    assert (await ask(address, "GET", "/a", tls=authority.client(pair))).status == 200
    with pytest.raises((OSError, AssertionError)):
        await ask(address, "GET", "/b", tls=authority.client())
    assert [request.target for request in house.backend.seen] == ["/a"]


@pytest.mark.parametrize(
    ("issued", "said"),
    [
        ({}, "The client certificate has no URI, and needs exactly one."),
        ({"uris": [AGENT, f"{AGENT}/2"]}, "The client certificate has more than one URI"),
    ],
)
async def test_a_verified_certificate_without_exactly_one_name_gets_401(
    build: Build, authority: Authority, pair: Pair, issued: dict[str, Any], said: str
) -> None:
    """Even where no credential is required: one that is presented must be valid."""
    house = await build(data=verifying(authority, pair), auth={"mtls": {"id": "uri"}})
    tls = authority.client(authority.issue("agent", **issued))
    answer = await ask(house.sidecar.data_address, "GET", "/a", tls=tls)
    assert (answer.status, answer.json()["methods"]) == (401, ["mtls"])
    assert answer.json()["message"].startswith(said)
    assert house.backend.seen == []


async def test_an_execution_by_certificate_leaves_its_holder_in_the_record(
    build: Build, authority: Authority, pair: Pair
) -> None:
    roles = Roles({role: Holders(ids=(AGENT,)) for role in ("issuer", "executor", "observer")})
    house = await build(
        data=verifying(authority, pair),
        admin=verifying(authority, pair),
        auth={"mtls": {"id": "uri"}},
        tls=authority.client(authority.issue("agent", uris=[AGENT])),
        policies=replace(POLICIES, roles=roles),
    )
    answer = await house.execute(await house.issue())
    assert answer.status == 200
    record = await house.record(answer.header("Scopegate-Decision-Id") or "")
    assert record["principal"] == {"id": AGENT, "kind": "service", "method": "mtls"}


async def test_the_admin_listener_knows_the_holder_of_a_certificate(
    build: Build, authority: Authority, pair: Pair
) -> None:
    house = await build(admin=verifying(authority, pair), auth={"mtls": {"id": "uri"}})
    address = house.sidecar.admin_address
    agent, other = ([AGENT], ["spiffe://test/agent"])
    answers = [
        await ask(address, "GET", STATUS, tls=authority.client(authority.issue("agent", uris=uris)))
        for uris in (agent, other, [])
    ]
    assert [answer.status for answer in answers] == [200, 403, 401]


# The admin listener beyond loopback ---------------------------------------------------------------------


async def asked_as(house: House, host: str, **more: Any) -> Message:
    """The status, asked under a name of the admin listener. It listens on every interface."""
    address = house.sidecar.admin_address
    assert isinstance(address, Listen)
    there = Listen("127.0.0.1", address.port)
    headers = [("Host", host), *more.pop("headers", [])]
    return await ask(there, more.pop("method", "GET"), STATUS, headers, tls=house.tls)


async def test_beyond_loopback_operators_reach_the_admin_listener_by_its_names(
    build: Build, authority: Authority, pair: Pair
) -> None:
    agent = authority.client(authority.issue("agent", uris=[AGENT]))
    options = {"auth": {"mtls": {"id": "uri"}}, "tls": agent}
    admin = verifying(authority, pair, "0.0.0.0:0")
    house = await build(admin=admin, **options)
    for host in ("gate.test", "gate.test:9901", "10.1.2.3", "localhost"):
        assert (await asked_as(house, host)).status == 200
    # A page of another site can make a browser send its certificate, so its changes are still refused.
    for header in (("Origin", "https://evil.test"), ("Sec-Fetch-Site", "cross-site")):
        answer = await asked_as(house, "gate.test", method="POST", headers=[header])
        assert (answer.status, answer.json()["error"]) == (403, "cross_site")


async def test_with_a_list_of_hosts_it_answers_under_those_names_only(
    build: Build, authority: Authority, pair: Pair
) -> None:
    admin = verifying(authority, pair, "0.0.0.0:0") | {"allowed_hosts": ["gate.test"]}
    tls = authority.client(authority.issue("agent", uris=[AGENT]))
    house = await build(admin=admin, auth={"mtls": {"id": "uri"}}, tls=tls)
    statuses = [(await asked_as(house, host)).status for host in ("gate.test", "127.0.0.1", "evil.test")]
    assert statuses == [200, 200, 421]


async def test_behind_a_trusted_proxy_only_listed_names_count(
    build: Build, authority: Authority, pair: Pair
) -> None:
    """The browser sees the certificate of the proxy, so that of the listener does not stop a false name."""
    proxy = {"proxy": {"header": "X-User", "trusted": ["127.0.0.1"]}}
    user = [("X-User", "alice")]
    admin = {"listen": "0.0.0.0:0", "tls": pair.settings(), "allowed_hosts": ["gate.test"]}
    house = await build(admin=admin, auth=proxy)
    assert (await asked_as(house, "gate.test", headers=user)).status == 200
    answer = await asked_as(house, "evil.test", headers=user)
    assert (answer.status, answer.json()["error"]) == (421, "misdirected_request")


async def test_behind_a_trusted_proxy_an_empty_list_means_loopback_names(
    build: Build, authority: Authority, pair: Pair
) -> None:
    proxy = {"proxy": {"header": "X-User", "trusted": ["127.0.0.1"]}}
    house = await build(admin={"listen": "0.0.0.0:0", "tls": pair.settings()}, auth=proxy)
    user = [("X-User", "alice")]
    assert (await asked_as(house, "localhost", headers=user)).status == 200
    assert (await asked_as(house, "gate.test", headers=user)).status == 421


# Proxies ------------------------------------------------------------------------------------------------

FROM_PROXY = [("X-User", "alice"), ("X-Teams", "oncall, sre")]


def proxied(*trusted: str) -> dict[str, Any]:
    return {**EVERYWHERE, "proxy": {"header": "X-User", "groups_header": "X-Teams", "trusted": trusted}}


async def test_a_trusted_proxy_names_the_caller_and_its_headers_go_on(build: Build) -> None:
    house = await build(auth=proxied("127.0.0.0/8"))
    assert (await house.data("GET", "/a", FROM_PROXY)).status == 200
    (request,) = house.backend.seen
    assert (request.header("X-User"), request.header("X-Teams")) == ("alice", "oncall, sre")


@pytest.mark.parametrize("trusted", ["10.0.0.0/8", "unix", "::1"])
async def test_from_another_peer_the_headers_name_nobody_and_are_removed(build: Build, trusted: str) -> None:
    house = await build(auth=proxied(trusted) | {"required_on": ["gated"]})
    answer = await house.data("GET", "/a", [*FROM_PROXY, ("x_user", "root")])
    assert answer.status == 200
    (request,) = house.backend.seen
    assert not {"x-user", "x_user", "x-teams"} & {name.lower() for name, _ in request.raw_headers}
    assert (await house.execute(None, headers=FROM_PROXY)).status == 401


@pytest.mark.parametrize(
    "headers",
    [
        [("X-User", "alice"), ("X-User", "alice")],
        [("X-User", "root, alice")],
        [("X-User", "")],
        [("X-User", "anonymous")],
        [("X-User", "alice"), ("X_User", "root")],
        [("X-User", "alice"), ("X-Teams", "a"), ("X-Teams", "b")],
    ],
)
async def test_headers_of_a_trusted_proxy_that_could_mean_two_callers_get_401(
    build: Build, headers: list[tuple[str, str]]
) -> None:
    house = await build(auth=proxied("127.0.0.1"))
    answer = await house.data("GET", "/a", headers)
    assert (answer.status, answer.json()["methods"]) == (401, ["proxy"])
    assert house.backend.seen == []


async def test_a_trusted_unix_socket_is_believed(build: Build, tmp_path: Path) -> None:
    house = await build(data={"listen": f"unix:{tmp_path}/d.sock"}, auth=proxied("unix"))
    assert isinstance(house.sidecar.data_address, SocketFile)
    assert (await house.data("GET", "/a", FROM_PROXY)).status == 200
    assert (await house.data("GET", "/b")).status == 401


async def test_a_client_that_resets_its_tcp_connection_is_not_taken_for_a_unix_socket() -> None:
    """The system then knows no peer any more, but what the client has sent before can still be read."""
    seen: list[tuple[object, str]] = []

    class Peer(asyncio.Protocol):
        received = b""

        def __init__(self) -> None:
            self.lost = asyncio.Event()

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            seen.append((transport.get_extra_info("peername"), peer_of(transport)))

        def data_received(self, data: bytes) -> None:
            self.received += data

        def connection_lost(self, exc: Exception | None) -> None:
            self.lost.set()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = socket.create_connection(listening.getsockname())
        client.sendall(request_bytes("GET", "/a", FROM_PROXY))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        accepted, _ = listening.accept()
    accepted.setblocking(False)
    _, peer = await asyncio.get_running_loop().connect_accepted_socket(Peer, accepted)
    await asyncio.wait_for(peer.lost.wait(), 5)
    assert seen == [(None, "")]


async def test_who_asks_is_found_out_anew_for_each_request_of_a_connection(build: Build) -> None:
    house = await build(auth=proxied("127.0.0.1"))
    reader, writer = await connect(house.sidecar.data_address)
    statuses = []
    for headers in (FROM_PROXY, [], FROM_PROXY):
        writer.write(request_bytes("GET", "/a", headers))
        answer = await read_message(reader)
        assert answer is not None
        statuses.append(answer.status)
    writer.close()
    assert statuses == [200, 401, 200]

"""The keys of an issuer over https: a real server on loopback, right, late, broken, and with other keys."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from sidecar.auth.failure import AuthFailure
from sidecar.auth.jwks import MAX_BYTES, IssuerKeys, KeySet, Times
from sidecar.core.principal import Principal
from sidecar.errors import ScopegateError
from sidecar.telemetry.metrics import Metrics
from tests.certificates import Authority
from tests.support import (
    SECOND,
    Backend,
    Clock,
    House,
    eventually,
    opened,
    replies,
    sends,
    serving_backend,
    unused_port,
)
from tests.tokens import (
    AUDIENCE,
    EC_KEY,
    ISSUER,
    OTHER_RSA_KEY,
    RSA_KEY,
    claims,
    jwk,
    key_set,
    private_jwk,
    signed,
)

# A test fetches by itself, unless it says otherwise.
RARELY = Times(fetch=3600, retry=3600, max_retry=3600, unknown=3600, timeout=5)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
async def issuer(authority: Authority) -> AsyncIterator[Backend]:
    """An https server that answers with one key, k1."""
    tls = authority.server(authority.issue("issuer"))
    async with serving_backend(tls=tls) as server:
        server.script = replies(key_set(jwk(RSA_KEY, "k1")))
        yield server


Follow = Callable[..., Awaitable[IssuerKeys]]


@pytest.fixture
async def follow(issuer: Backend, authority: Authority) -> AsyncIterator[Follow]:
    """Starts to follow the keys of the issuer."""
    async with AsyncExitStack() as stack:

        async def start(times: Times = RARELY, *, url: str | None = None, **more: Any) -> IssuerKeys:
            options = {"ca_file": authority.certificate_file, "metrics": Metrics(), **more}
            keys = IssuerKeys(url or f"{issuer.url}/jwks?v=1", times=times, **options)
            stack.push_async_callback(keys.close)
            await keys.start()
            return keys

        yield start


def kids(keys: KeySet) -> list[str | None]:
    return [key.kid for key in keys.keys]


def causes(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [vars(record)["cause"] for record in caplog.records if record.name == "scopegate.auth"]


# Fetching -----------------------------------------------------------------------------------------------


async def test_the_keys_are_fetched_before_the_start_is_complete(follow: Follow, issuer: Backend) -> None:
    metrics = Metrics()
    keys = await follow(metrics=metrics)
    assert kids(keys.keys) == ["k1"]
    (request,) = issuer.seen
    assert (request.method, request.target) == ("GET", "/jwks?v=1")
    sent = {name.lower(): value for name, value in request.raw_headers}
    assert (sent["accept"], sent["accept-encoding"]) == ("application/json", "identity")
    assert not {"authorization", "cookie"} & sent.keys()
    assert "scopegate_jwt_keys 1.0" in metrics.page().decode()
    assert "scopegate_jwt_key_failures_total 0.0" in metrics.page().decode()


WRONG: dict[str, tuple[Any, str]] = {
    "500": (replies(b"oh", status="500 Oh"), "the answer has the status 500"),
    "204": (replies(b"", status="204 No Content"), "the answer has the status 204"),
    "302": (
        replies(b"", status="302 Found", headers=[("Location", "https://127.0.0.1:1/elsewhere")]),
        "the answer has the status 302; redirects are not followed",
    ),
    "no JSON": (replies(b"<html>"), "is no JSON Web Key Set"),
    "broken JSON": (replies(b'{"keys": ['), "is not JSON here"),
    "no keys": (replies(b'{"keys": []}'), "has no key that verifies signatures"),
    "too large": (replies(b'{"keys": [' + b" " * 10_000_000), f"is larger than {MAX_BYTES} bytes"),
    "a private key": (replies(key_set(private_jwk(RSA_KEY, "k2"))), "holds a secret (member d)"),
    "a secret": (replies(key_set({"kty": "oct", "k": "eA", "kid": "k2"})), "holds a secret (member k)"),
    "cut off": (
        sends(b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"keys": ', then="close"),
        "not completed",
    ),
    "no HTTP": (sends(b"SSH-2.0-x\r\n", then="close"), ""),
    "compressed": (
        replies(b"\x1f\x8b\x08\x00", headers=[("Content-Encoding", "gzip")]),
        "is no JSON Web Key Set",
    ),
}


@pytest.mark.parametrize("name", WRONG)
async def test_an_answer_that_is_no_key_set_leaves_the_last_good_keys(
    follow: Follow, issuer: Backend, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    metrics = Metrics()
    keys = await follow(metrics=metrics)
    issuer.script, said = WRONG[name]
    await keys.fetch()
    assert kids(keys.keys) == ["k1"]
    (cause,) = causes(caplog)
    assert cause.startswith(issuer.url)
    assert said in cause
    assert caplog.records[-1].message.startswith("the keys of the issuer could not be read; the last good")
    assert "scopegate_jwt_key_failures_total 1.0" in metrics.page().decode()
    issuer.script = replies(key_set(jwk(EC_KEY, "k2")))
    await keys.fetch()
    assert kids(keys.keys) == ["k2"]


async def test_a_redirect_is_not_followed(follow: Follow, issuer: Backend) -> None:
    keys = await follow()
    issuer.script = replies(b"", status="307 Go", headers=[("Location", f"{issuer.url}/other")])
    await keys.fetch()
    assert [request.target for request in issuer.seen] == ["/jwks?v=1"] * 2


@pytest.mark.parametrize("pieces", [(), (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{",)])
async def test_a_server_that_hangs_is_given_up(
    follow: Follow, issuer: Backend, caplog: pytest.LogCaptureFixture, pieces: tuple[bytes, ...]
) -> None:
    issuer.script = sends(*pieces, then="hang")
    keys = await follow(Times(timeout=0.2, retry=3600, max_retry=3600))
    assert keys.keys == KeySet()
    assert causes(caplog) == [f"{issuer.url}/jwks?v=1: no whole answer within 0.2 s"]
    said = "no key of its issuer is known, because the key set could not be read so far"
    assert keys.find("k1", "RS256") == said


async def test_a_server_that_sends_without_end_is_given_up(follow: Follow, issuer: Backend) -> None:
    async def endless(request: object, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{")
        while True:
            writer.write(b" " * 65_536)
            await writer.drain()
            await asyncio.sleep(0)  # `drain` need not wait once TLS is shutting down

    issuer.script = endless
    keys = await follow(Times(timeout=60, retry=3600, max_retry=3600))
    assert keys.keys == KeySet()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"ca_file": None}, "unable to get local issuer certificate"),
        ({"ca_file": "stranger"}, "unable to get local issuer certificate"),
        ({"ca_file": Path("/gone.pem")}, "auth.jwt.ca_file: /gone.pem cannot be read"),
        ({"url": "https://localhost:PORT/jwks"}, "Hostname mismatch"),
    ],
)
async def test_an_issuer_that_cannot_be_verified_is_not_believed(
    follow: Follow,
    issuer: Backend,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    files: dict[str, Any],
    said: str,
) -> None:
    options = dict(files)
    if options.get("ca_file") == "stranger":
        options["ca_file"] = Authority(tmp_path, "stranger").certificate_file
    if "url" in options:
        options["url"] = options["url"].replace("PORT", issuer.url.rpartition(":")[2])
    keys = await follow(**options)
    assert keys.keys == KeySet()
    assert issuer.seen == []
    (cause,) = causes(caplog)
    assert said.lower() in cause.lower()


async def test_an_issuer_that_does_not_listen_is_tried_again(
    follow: Follow, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics()
    quick = Times(retry=0.001, max_retry=0.002)
    await follow(quick, url=f"https://127.0.0.1:{unused_port()}/jwks", metrics=metrics)
    await eventually(lambda: len(causes(caplog)) > 3)
    assert all("Connect call failed" in cause or "refused" in cause for cause in causes(caplog))


async def test_the_waits_after_failures_double_up_to_a_bound(follow: Follow, issuer: Backend) -> None:
    issuer.script = replies(b"", status="500 Oh")
    keys = await follow(Times(fetch=300, retry=5, max_retry=60))
    waits = [keys._pause()]
    for _ in range(6):
        await keys.fetch()
        waits.append(keys._pause())
    assert waits == [5, 10, 20, 40, 60, 60, 60]
    issuer.script = replies(key_set(jwk(RSA_KEY, "k1")))
    await keys.fetch()
    assert keys._pause() == 300


async def test_the_keys_are_fetched_again_by_and_by(follow: Follow, issuer: Backend) -> None:
    keys = await follow(Times(fetch=0.01))
    issuer.script = replies(key_set(jwk(EC_KEY, "k2")))
    await eventually(lambda: kids(keys.keys) == ["k2"])


async def test_a_certificate_authority_that_is_renewed_counts_from_the_next_fetch_on(
    issuer: Backend, authority: Authority, tmp_path: Path, follow: Follow
) -> None:
    file = tmp_path / "trusted.pem"
    file.write_bytes(Authority(tmp_path, "stranger").certificate_file.read_bytes())
    keys = await follow(ca_file=file)
    assert keys.keys == KeySet()
    file.write_bytes(authority.certificate_file.read_bytes())
    await keys.fetch()
    assert kids(keys.keys) == ["k1"]


# Keys that are not known --------------------------------------------------------------------------------


async def test_an_unknown_kid_brings_a_fetch_forward_once_in_a_while(follow: Follow, issuer: Backend) -> None:
    keys = await follow(Times(fetch=3600, unknown=3600))
    issuer.script = replies(key_set(jwk(RSA_KEY, "k1"), jwk(EC_KEY, "k2")))
    for _ in range(100):
        assert keys.find("k2", "ES256") == "its issuer has no key of this name (kid)"
    await eventually(lambda: kids(keys.keys) == ["k1", "k2"])
    assert not isinstance(keys.find("k2", "ES256"), str)
    for number in range(100):
        keys.find(f"k{number + 3}", "ES256")
        await asyncio.sleep(0)
    await asyncio.sleep(0.05)
    assert len(issuer.seen) == 2
    assert RARELY.unknown > Times().unknown == 60


async def test_an_unknown_kid_fetches_again_after_that_time(follow: Follow, issuer: Backend) -> None:
    keys = await follow(Times(fetch=3600, unknown=0))
    for _ in range(2):
        issuer.arrived.clear()
        keys.find("k2", "ES256")
        await asyncio.wait_for(issuer.arrived.wait(), 5)


async def test_other_mistakes_of_a_token_fetch_nothing(follow: Follow, issuer: Backend) -> None:
    keys = await follow(Times(fetch=3600, unknown=0))
    keys.find("k1", "ES256")
    keys.find(None, "RS256")
    await asyncio.sleep(0.05)
    assert len(issuer.seen) == 1


# In a sidecar -------------------------------------------------------------------------------------------

Build = Callable[..., Awaitable[House]]


@pytest.fixture
async def build(tmp_path: Path, clock: Clock, issuer: Backend, authority: Authority) -> AsyncIterator[Build]:
    """Opens a sidecar that takes the tokens of the issuer."""
    async with AsyncExitStack() as stack:

        async def build_one(*, jwks: str | None = None, **options: Any) -> House:
            jwt = {"issuer": ISSUER, "audience": AUDIENCE, "jwks": jwks or f"{issuer.url}/jwks"}
            jwt |= {} if jwks is not None else {"ca_file": str(authority.certificate_file)}
            backend = await stack.enter_async_context(serving_backend())
            auth = {"jwt": jwt, "required": True, "required_on": ["gated", "scopes", "pass"]}
            return await stack.enter_async_context(
                opened(tmp_path, backend, clock=clock, auth=auth, **options)
            )

        yield build_one


def token_of(house: House, **more: Any) -> str:
    return signed(claims(house.clock() // SECOND, **more))


async def status_of(house: House, token: str) -> int:
    answer = await house.data("GET", "/agents", [("Scopegate-Authorization", f"Bearer {token}")])
    return answer.status


async def test_a_valid_token_lets_a_request_through_and_a_changed_or_expired_one_gets_401(
    build: Build,
) -> None:
    house = await build()
    token = token_of(house)
    assert await status_of(house, token) == 200
    assert await status_of(house, token[:-9] + "AAAAAAAAA") == 401
    assert await status_of(house, token_of(house, exp=house.clock() // SECOND - 1)) == 401
    assert (await house.data("GET", "/agents")).status == 401
    assert len(house.backend.seen) == 1
    # The result is kept, and still ends with the token, by the sidecar's clock.
    house.clock.move(3599)
    assert await status_of(house, token) == 200
    house.clock.move(2)
    assert await status_of(house, token) == 401


async def test_the_sidecar_starts_without_its_issuer_and_says_what_is_missing(
    build: Build, issuer: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    issuer.script = replies(b"", status="503 Later")
    house = await build()
    warned = [record.levelname for record in caplog.records if "no key of the issuer" in record.message]
    assert warned == ["WARNING"]
    order = [record.message for record in caplog.records if record.message != "listening"]
    assert "no key of the issuer is known; every JSON Web Token is refused" in order
    answer = await house.data("GET", "/agents", [("Scopegate-Authorization", f"Bearer {token_of(house)}")])
    assert (answer.status, answer.json()["error"]) == (401, "unauthenticated")
    assert "no key of its issuer is known" in answer.json()["message"]
    issuer.script = replies(key_set(jwk(RSA_KEY, "k1")))
    assert house.sidecar.issuer_keys is not None
    await house.sidecar.issuer_keys.fetch()
    assert await status_of(house, token_of(house)) == 200


async def test_a_key_that_its_issuer_withdraws_verifies_nothing_any_more(
    build: Build, issuer: Backend
) -> None:
    """The old kid is gone and the new one is there; what was verified before is verified anew."""
    house = await build()
    old, new = token_of(house), signed(claims(house.clock() // SECOND), OTHER_RSA_KEY, kid="k2")
    assert [await status_of(house, token) for token in (old, new)] == [200, 401]
    issuer.script = replies(key_set(jwk(OTHER_RSA_KEY, "k2")))
    # The unknown kid has brought the fetch forward.
    keys = house.sidecar.issuer_keys
    assert keys is not None
    await keys.fetch()
    assert [await status_of(house, token) for token in (old, new)] == [401, 200]
    assert isinstance(house.sidecar.live.snapshot.methods.bearer(old, house.clock), AuthFailure)
    assert isinstance(house.sidecar.live.snapshot.methods.bearer(new, house.clock), Principal)


async def test_a_file_of_keys_that_cannot_be_used_prevents_the_start(build: Build, tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    file.write_bytes(key_set(private_jwk(EC_KEY, "k1")))
    with pytest.raises(ScopegateError, match=r"jwks\.json:1:11: holds a secret \(member d\)"):
        await build(jwks=str(file))


async def test_a_file_of_keys_serves_as_well(build: Build, tmp_path: Path, issuer: Backend) -> None:
    file = tmp_path / "jwks.json"
    file.write_bytes(key_set(jwk(RSA_KEY, "k1")))
    house = await build(jwks=str(file))
    assert await status_of(house, token_of(house)) == 200
    assert issuer.seen == []

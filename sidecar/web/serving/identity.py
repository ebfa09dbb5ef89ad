"""Who asks: where a credential stands in a request, and what becomes of one that is not valid.

1. A bearer token stands in `Authorization` on the calls of the sidecar. It stands in
   `Scopegate-Authorization` on all other requests, whose `Authorization` belongs to the backend.
2. Every credential that is presented must be valid. If several are, the first of bearer, certificate and
   trusted proxy says who asks.
3. A credential that is not valid, or that stands there twice, is refused with 401. The caller is never taken
   for another one, nor for `anonymous`.
4. A header of the trusted proxy counts only if the connection comes from there. From every other peer it is
   ignored, and removed from what goes on to the backend.
5. Failures are limited for each peer. Whether a failure is throttled is asked after the credential was found
   to be wrong, so that a peer that fails does not keep out the callers behind the same address.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Sequence
from functools import lru_cache
from string import ascii_letters, digits
from typing import Literal

from sidecar.auth.failure import AuthFailure
from sidecar.auth.methods import Found, Methods
from sidecar.core.principal import ANONYMOUS, Method, Principal
from sidecar.core.targetheaders import read_as
from sidecar.errors import Refusal
from sidecar.live.snapshot import Snapshot
from sidecar.settings.auth import Area, ProxySection
from sidecar.telemetry.metrics import Metrics
from sidecar.web.wire.headers import HeaderFields

# After so many failures of one peer within this time, its further failures are throttled.
MOST_FAILURES = 20
WITHIN_SECONDS = 10.0
# The peers whose failures are remembered. The one that failed first is forgotten first.
MOST_PEERS = 10_000

OURS = b"authorization"
# The characters of a token before its closing `=` (RFC 6750, section 2.1).
_TOKEN_CHARS = (ascii_letters + digits + "-._~+/").encode()

Place = Literal["call", "request"]  # a call of the sidecar, or any other request


class Identities:
    """Finds out who asks, anew for each request of a connection. `clock` is in microseconds since 1970."""

    def __init__(self, metrics: Metrics, clock: Callable[[], int]) -> None:
        self._metrics = metrics
        self._clock = clock
        self._failures: dict[str, list[float]] = {}

    def of(
        self,
        fields: HeaderFields,
        transport: asyncio.BaseTransport | None,
        snapshot: Snapshot,
        *,
        place: Place,
        area: Area | None,
    ) -> Principal | Refusal:
        """The principal that asks, or why it is not known.

        `area` says where a credential may be required; None: it is required if any is.
        """
        methods, auth = snapshot.methods, snapshot.settings.auth
        if not methods.names:
            return ANONYMOUS
        found = self._presented(fields, transport, methods, auth.proxy, place)
        if found is None:
            if not auth.required or (area is not None and area not in auth.required_on):
                return ANONYMOUS
            found = AuthFailure("none", f"{_where(methods, place)} is required")
        if isinstance(found, AuthFailure):
            return self._refused(found, transport, methods)
        self._metrics.authenticated.labels(found.method, found.kind).inc()
        return found

    def _presented(
        self,
        fields: HeaderFields,
        transport: asyncio.BaseTransport | None,
        methods: Methods,
        proxy: ProxySection,
        place: Place,
    ) -> Found | None:
        """The principal by the first credential that is presented, if all of them are valid."""
        first: Principal | None = None
        bearer = _bearer(fields, place, is_taken=methods.takes_bearers)
        if bearer is not None:
            found = bearer if isinstance(bearer, AuthFailure) else methods.bearer(bearer, self._clock)
            if isinstance(found, AuthFailure):
                return found
            first = found
        if methods.mtls is not None and transport is not None:
            certificate = transport.get_extra_info("peercert")
            if certificate:
                found = methods.certificate(certificate)
                if isinstance(found, AuthFailure):
                    return found
                first = first or found
        if methods.proxy is not None and proxy.header is not None:
            named = fields.read_as(read_as(proxy.header))
            if named and methods.proxy.trusts(peer_of(transport)):
                found = self._proxied(fields, methods, proxy, named)
                if isinstance(found, AuthFailure):
                    return found
                first = first or found
        return first

    @staticmethod
    def _proxied(fields: HeaderFields, methods: Methods, proxy: ProxySection, named: Sequence[int]) -> Found:
        groups: Sequence[int] = ()
        if proxy.groups_header is not None:
            groups = fields.read_as(read_as(proxy.groups_header))
        for place, wanted in (
            *((at, proxy.header) for at in named),
            *((at, proxy.groups_header) for at in groups),
        ):
            if wanted is not None and fields.pairs[place][0].decode("latin-1").lower() != wanted.lower():
                return AuthFailure("proxy", f"a header of the request can be read as {wanted}")
        return methods.proxied(_texts(fields, named), _texts(fields, groups))

    def _refused(
        self, failure: AuthFailure, transport: asyncio.BaseTransport | None, methods: Methods
    ) -> Refusal:
        """The refusal of a credential, which a peer that fails too often gets later."""
        self._metrics.auth_failures.labels(failure.method).inc()
        names: list[Method] = list(methods.names) if failure.method == "none" else [failure.method]
        wait = self._throttled(peer_of(transport))
        if wait is not None:
            return Refusal(
                "auth_throttled",
                f"{MOST_FAILURES} credentials from this peer in {WITHIN_SECONDS:g} s were not valid.",
                {"methods": names, "retry_after_seconds": wait},
            )
        message = f"{failure.message[:1].upper()}{failure.message[1:]}."
        return Refusal("unauthenticated", message, {"methods": names})

    def _throttled(self, peer: str) -> int | None:
        """Note a failure of a peer. The seconds after which it may fail again, None if it may now."""
        now = asyncio.get_running_loop().time()
        times = self._failures.pop(peer, [])
        self._failures[peer] = times  # the last one to fail is the last one to be forgotten
        while times and times[0] <= now - WITHIN_SECONDS:
            del times[0]
        if len(times) >= MOST_FAILURES:
            return max(1, -int(-(times[0] + WITHIN_SECONDS - now) // 1))
        times.append(now)
        if len(self._failures) > MOST_PEERS:
            del self._failures[next(iter(self._failures))]
        return None


def withheld(
    fields: HeaderFields, transport: asyncio.BaseTransport | None, snapshot: Snapshot
) -> tuple[int, ...]:
    """The places of the headers that do not go on to the backend: the credential for the sidecar, and the
    headers of a trusted proxy that come from another peer."""
    places = fields.credential
    proxy = snapshot.settings.auth.proxy
    if proxy.header is None or snapshot.methods.proxy is None:
        return places
    names = [read_as(name) for name in (proxy.header, proxy.groups_header) if name is not None]
    named = [place for name in names for place in fields.read_as(name)]
    if not named or snapshot.methods.proxy.trusts(peer_of(transport)):
        return places
    return (*places, *named)


def peer_of(transport: asyncio.BaseTransport | None) -> str:
    """The address of the other end of a connection, without its port; `unix` for a Unix socket, and nothing
    once the connection is gone.

    A TCP connection that its client has reset has no peer name either, although its bytes can still be read.
    Only the kind of the socket tells it from a Unix socket, which may be trusted.
    """
    if transport is None:
        return ""
    name = transport.get_extra_info("peername")
    if isinstance(name, tuple) and name:
        return _address(name[0])
    connection = transport.get_extra_info("socket")
    return "unix" if connection is not None and connection.family == socket.AF_UNIX else ""


@lru_cache(maxsize=4096)
def _address(text: str) -> str:
    """An address in its shortest spelling. A socket for IPv6 shows callers by IPv4 as mapped addresses."""
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def bearer_in(values: Sequence[str]) -> str | None:
    """The token in the values of an authorization header. None: it has none, or can be read in two ways."""
    if len(values) != 1:
        return None
    scheme, _, rest = values[0].strip(" \t").partition(" ")
    token = rest.lstrip(" ")
    text = token.rstrip("=").encode("ascii", "replace")
    # A pattern takes eight times as long, and JSON Web Tokens are long.
    if scheme.lower() != "bearer" or not text or text.translate(None, _TOKEN_CHARS):
        return None
    return token


def _bearer(fields: HeaderFields, place: Place, *, is_taken: bool) -> str | AuthFailure | None:
    """The bearer token of a request, if it has one."""
    beside = _texts(fields, fields.credential)
    method: Method = "tokens"
    if place == "call":
        if beside:
            message = "on this call the token stands in Authorization, not in Scopegate-Authorization"
            return AuthFailure(method, message)
        given, header = fields.texts(OURS), "Authorization"
        # A proxy may send on how it has authenticated the caller itself.
        if not is_taken and not any(value[:7].lower() == "bearer " for value in given):
            return None
    else:
        given, header = beside, "Scopegate-Authorization"
    if not given:
        return None
    token = bearer_in(given)
    if token is None:
        return AuthFailure(method, f"{header} must stand there once, as Bearer with one token")
    return token


def _texts(fields: HeaderFields, places: Sequence[int]) -> list[str]:
    return [fields.pairs[place][1].decode("utf-8", "surrogateescape") for place in places]


def _where(methods: Methods, place: Place) -> str:
    """What a caller can present, in words."""
    header = "Authorization: Bearer" if place == "call" else "Scopegate-Authorization: Bearer"
    ways = {
        "tokens": f"a token ({header})",
        "jwt": f"a JSON Web Token ({header})",
        "mtls": "a client certificate",
        "proxy": "the header of the trusted proxy",
    }
    found = [ways[name] for name in methods.names]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"

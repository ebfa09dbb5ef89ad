"""The checks of the host that a request names and of the site that it comes from.

Every listener refuses a request that names no well-formed host (400). The sidecar's own calls need no
authentication, so they refuse two more kinds of requests, which a web page can make an operator's browser
send:

- a request to a host that is not one of the listener's (421). This is DNS rebinding, and the page could read
  the answer.
- a change from another site (403), according to the browser's Origin and Sec-Fetch-Site headers. The page
  cannot read the answer, but the change would be made. GET, HEAD and OPTIONS change nothing.

A program that sends none of these headers is not a browser, and is served. On a Unix socket a host means
nothing, because no browser connects to one and the mode of its file says who may. Any host is therefore
accepted there, unless the configuration lists hosts.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Literal

from aiohttp import HttpVersion10, HttpVersion11, web

from sidecar.core.host import Host, answers_to, hosts_of
from sidecar.errors import Refusal
from sidecar.live.snapshot import Live
from sidecar.telemetry.events import LogEvent
from sidecar.web.wire.headers import HeaderFields, fields_of
from sidecar.web.wire.problem import problem
from sidecar.web.wire.request import AnyRequest

UNCHANGING = frozenset({"GET", "HEAD", "OPTIONS"})
# The values of Sec-Fetch-Site for a request that no other site has caused.
OWN_SITE = frozenset({"same-origin", "none"})
MAX_SHOWN_CHARS = 253  # the maximum length of a DNS name


def malformed(request: AnyRequest, fields: HeaderFields) -> Refusal | None:
    """The refusal of a request without a well-formed host or of another HTTP version; None if it is fine."""
    if request.version not in (HttpVersion11, HttpVersion10):
        # The parser also accepts HTTP/0.9 and 2.0, and both would be forwarded as 1.1.
        return Refusal("invalid_request", "Only HTTP/1.0 and HTTP/1.1 are spoken here.")
    hosts = _hosts(request, fields)
    return _malformed(hosts) if isinstance(hosts, str) else None


@web.middleware
async def well_formed_hosts(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """The middleware of a listener that only checks for a well-formed host."""
    refusal = malformed(request, fields_of(request))
    return await handler(request) if refusal is None else problem(refusal)


class Guard:
    """The checks that the sidecar's own calls on one listener make before anything else."""

    def __init__(self, listener: Literal["data", "admin"], live: Live) -> None:
        self._listener = listener
        self._live = live

    def refusal(self, request: AnyRequest) -> Refusal | None:
        """The refusal of a request; None if it may be answered."""
        fields = fields_of(request)
        refusal = malformed(request, fields) or self._foreign(request, fields)
        if refusal is not None:
            LogEvent.FOREIGN.log(listener=self._listener, method=request.method, error=refusal.code)
        return refusal

    def _foreign(self, request: AnyRequest, fields: HeaderFields) -> Refusal | None:
        hosts = _hosts(request, fields)
        assert not isinstance(hosts, str)
        settings = self._live.snapshot.settings
        section = settings.data if self._listener == "data" else settings.admin
        names = settings.hosts_of(self._listener)
        for host in hosts:
            if names is not None and not answers_to(host, names):
                return _misdirected(host, f"{self._listener}.allowed_hosts")
        if request.method in UNCHANGING:
            return None
        for site in fields.texts(b"sec-fetch-site"):
            if site not in OWN_SITE:
                return _cross_site("Sec-Fetch-Site says that another site has sent this")
        scheme = "http" if section.tls.certificate_file is None else "https"
        for origin in fields.texts(b"origin"):
            if not hosts or not all(host.is_origin(origin, scheme) for host in hosts):
                return _cross_site(f"Origin is not the {scheme} address that this was sent to")
        return None


def _hosts(request: AnyRequest, fields: HeaderFields) -> tuple[Host, ...] | str:
    return hosts_of(
        request.method,
        request._message.path,  # the raw target, because yarl has changed every public form
        fields.texts(b"host"),
        needed=request.version != HttpVersion10,
    )


def _malformed(clause: str) -> Refusal:
    return Refusal("invalid_request", f"The request does not name exactly one valid host: {clause}.")


def _misdirected(host: Host, key: str) -> Refusal:
    return Refusal(
        "misdirected_request",
        f"This is answered under loopback names (localhost, 127.0.0.1, [::1]) and those in {key} only; if "
        f"{host.bare[:MAX_SHOWN_CHARS]} is a name of this listener, add it there.",
    )


def _cross_site(clause: str) -> Refusal:
    return Refusal(
        "cross_site",
        f"{clause}; send it from a page of this listener, or by a program that sends no such header.",
    )

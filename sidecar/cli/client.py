"""Calls a running sidecar: one connection per call, and one answer or an error that says why there is none.

An answer is accepted only if it has the form of a sidecar's answer. This module neither prints nor exits. It
imports little, because health checks run it every few seconds.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import ssl
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from sidecar.cli.credentials import Token
from sidecar.cli.shapes import Shape, misfit
from sidecar.settings.addresses import Address, Listen, SocketFile

TIMEOUT_SECONDS = 5.0
# Larger than the longest page of decisions. A longer answer does not come from a sidecar.
MAX_ANSWER_BYTES = 1 << 26
# A sidecar reads 8,190 bytes of a request's first line.
MAX_TARGET_BYTES = 8_000

_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
# The addresses at which this host reaches a listener that is bound to every interface.
_OWN = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class UnreachableError(Exception):
    """No answer came, or the answer is not a sidecar's. The message says where, why, and what to do."""


class UncertainError(Exception):
    """The change may have been made: the request was sent, and no answer came."""


class UnusableError(Exception):
    """An argument cannot be used: a TLS file, or values too long for a request."""


class ProblemError(Exception):
    """The sidecar answered with an error. Holds its status and its body."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(f"{body['error']}: {body['message']}")
        self.status = status
        self.body = body


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """The TLS settings of a call: how the server's certificate is verified, and the client's own certificate.

    `pinned` is the exact certificate expected, for any name. `ca` must have signed the server's certificate,
    which must then name the called host. Without either, the trust store of the system decides.
    """

    pinned: Path | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def context(self) -> ssl.SSLContext:
        """Raises UnusableError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        named = self.ca or self.pinned
        try:
            if self.ca is not None:
                context.load_verify_locations(self.ca)
            elif self.pinned is not None:
                context.check_hostname = False
                context.load_verify_locations(cadata=_first_certificate(self.pinned))
            else:
                context.load_default_certs()
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
            if self.certificate is not None:
                named = self.certificate
                # Without this password, OpenSSL would ask for one on the terminal.
                context.load_cert_chain(self.certificate, self.key, password=lambda: b"")
        except (OSError, ValueError) as exc:
            reason = getattr(exc, "reason", None) or getattr(exc, "strerror", None) or exc
            raise UnusableError(f"{named}: cannot be used for TLS ({reason}); give a PEM file") from exc
        return context


def _first_certificate(file: Path) -> str:
    """The listener's own certificate, which is the first in its file. The others in it must not be
    trusted."""
    found = _CERTIFICATE.search(file.read_text("ascii", "replace"))
    if found is None:
        raise ValueError("has no certificate")
    return found[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """The address of a listener, and whether it uses TLS."""

    address: Address
    tls: bool = False

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """`host:port`, `http://host:port`, `https://host:port` or `unix:/path`. Raises ValueError."""
        tls = text.startswith("https://")
        rest = text.removeprefix("https://") if tls else text.removeprefix("http://")
        if rest.startswith("unix:"):
            path = Path(rest.removeprefix("unix:"))
            if not path.is_absolute():
                raise ValueError(
                    "expects the whole path of the socket, such as unix:/run/scopegate/admin.sock"
                )
            return cls(address=SocketFile(path), tls=tls)
        address = Listen.parse(rest.rstrip("/"))
        return cls(address=address, tls=tls)

    def reachable(self) -> Endpoint:
        """The place at which this host reaches a listener that is bound to every interface."""
        if isinstance(self.address, Listen) and self.address.host in _OWN:
            return replace(self, address=replace(self.address, host=_OWN[self.address.host]))
        return self

    def __str__(self) -> str:
        return f"https://{self.address}" if self.tls else str(self.address)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallResult:
    """The answer of a sidecar: a JSON object, its Date header, and the id of the recorded decision, if
    any."""

    status: int
    body: dict[str, Any]
    decision_id: str | None = None
    date: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """One listener of a running sidecar, by its name in the configuration.

    The token, if there is one, goes with every request to this place, and to no other: redirects are answers
    that no sidecar gives, and are not followed.
    """

    name: str
    place: Endpoint
    trust: Trust
    token: Token | None = None
    timeout: float = TIMEOUT_SECONDS
    server_name: str | None = None  # the name in the server's certificate, if it is not the called host

    def get(self, path: str, shape: Shape, **query: str | int | None) -> CallResult:
        """GET a path. Members of the query that are None are left out."""
        wanted = {name: value for name, value in query.items() if value is not None}
        target = path + (f"?{urlencode(wanted, errors='surrogateescape')}" if wanted else "")
        return self.ask("GET", target, shape)

    def ask(
        self,
        method: str,
        target: str,
        shape: Shape,
        body: object = None,
        headers: Mapping[str, str | bytes] | None = None,
        *,
        also: int = 200,
        look: str | None = None,
    ) -> CallResult:
        """Send one request and return its answer, which must match the shape.

        A body of bytes is sent unchanged, any other body as JSON. `also` is a second status that counts as
        success. A request that changes something gives `look`: the command that shows whether the change was
        made. Raises UnreachableError, ProblemError, UnusableError, and with `look` UncertainError.
        """
        content = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        kind = {} if content is None else {"Content-Type": "application/json"}
        status, received, text = self.exchange(method, target, content, {**kind, **(headers or {})}, look)
        answer = _document(text)
        problem = answer if status >= 400 and answer and _is_problem(answer) else None
        if problem is not None and problem["error"] != "not_found":
            raise ProblemError(status, problem)
        if answer is None or problem is not None or not (200 <= status < 300 or status == also):
            raise self.stranger(status, problem)
        place = misfit(answer, shape)
        if place is not None:
            raise self.stranger(status, odd=place)
        decision_id, date = received.get("Scopegate-Decision-Id"), received.get("Date")
        return CallResult(status=status, body=answer, decision_id=decision_id, date=date)

    def exchange(
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        headers: Mapping[str, str | bytes] = {},
        look: str | None = None,
    ) -> tuple[int, Mapping[str, str], str]:
        """Exchange one request for status, headers and text of any HTTP server. All of it, from the
        connection to the last byte, takes at most `timeout` seconds. Raises UnreachableError, UnusableError
        and UncertainError."""
        if len(target) > MAX_TARGET_BYTES:
            raise UnusableError(
                f"the request line would have {len(target):,} bytes, more than {MAX_TARGET_BYTES:,}; give "
                "shorter values"
            )
        if self.token is not None:
            if not (self.place.tls or self.place.address.is_loopback()):
                raise UnusableError(
                    f"{self.place} is another host without TLS, and the token of {self.token.source} is not "
                    f"sent there; write --{self.name} https://HOST:PORT"
                )
            headers = {**headers, "Authorization": f"Bearer {self.token.text}"}
        context = self.trust.context() if self.place.tls else None
        connection = _TimedCall(self.place.address, context, self.timeout, self.server_name)
        try:
            connection.request(method, target, body, dict(headers))
            response = connection.getresponse()
            text = response.read(MAX_ANSWER_BYTES).decode("utf-8", "replace")
            return response.status, dict(response.headers), text
        except (OSError, http.client.HTTPException) as exc:
            foreign = isinstance(exc, http.client.HTTPException) and not isinstance(exc, _CUT)
            if look is not None and connection.has_sent and not foreign:
                raise UncertainError(
                    f"{self.place} got the request but did not answer in full ({self._why(exc)}); it may "
                    f"have been carried out: look with `{look}` before you repeat it"
                ) from exc
            raise UnreachableError(
                f"no sidecar answers on {self.place} ({self._why(exc)}); is it running, and is this its "
                f"{self.name}.listen?"
            ) from exc
        finally:
            connection.close()

    def stranger(
        self, status: int, problem: Mapping[str, Any] | None = None, odd: str | None = None
    ) -> UnreachableError:
        """The error for an answer that is not from this listener of a sidecar. `odd` is the member that does
        not fit."""
        said = f"{status}, and not as a sidecar would"
        if problem is not None:
            said = f"{status}: {problem['message'].rstrip('.')}"
        elif odd is not None:
            said += f" ({odd} is missing or no such value)"
        return UnreachableError(f"{self.place} answers {said}; is this its {self.name}.listen?")

    def _why(self, exc: Exception) -> str:
        if isinstance(exc, TimeoutError):
            return f"not within {self.timeout:g} s"
        if isinstance(exc, ssl.SSLCertVerificationError):
            return f"its certificate is not trusted: {exc.verify_message}"
        if isinstance(exc, ssl.SSLError):
            return f"TLS: {exc.reason or exc}"
        if isinstance(exc, _CUT):
            return "it hangs up"
        if isinstance(exc, http.client.HTTPException):
            return "it does not speak HTTP"
        return getattr(exc, "strerror", None) or str(exc)


# The exceptions for an answer that is missing or incomplete.
_CUT = (http.client.RemoteDisconnected, http.client.IncompleteRead)


class _TimedSocket(socket.socket):
    """A socket whose operations together end at one deadline, also if bytes keep arriving."""

    deadline = 0.0

    def hurry(self) -> None:
        """Give the next operation the time that is left. Raises TimeoutError if none is."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.settimeout(left)

    def connect(self, address: Any) -> None:
        self.hurry()
        super().connect(address)

    def sendall(self, *args: Any) -> None:
        self.hurry()
        super().sendall(*args)

    def recv_into(self, *args: Any) -> int:
        self.hurry()
        return super().recv_into(*args)


class _TimedTlsSocket(_TimedSocket, ssl.SSLSocket):
    """The same with TLS."""


class _TimedCall(http.client.HTTPConnection):
    """A connection to a sidecar: HTTP/1.1 over TCP or a Unix socket, with or without TLS. One deadline covers
    the whole call. The first request connects."""

    def __init__(
        self, address: Address, context: ssl.SSLContext | None, timeout: float, server_name: str | None
    ) -> None:
        super().__init__("localhost" if isinstance(address, SocketFile) else address.host)
        self._server_name = server_name or self.host
        self._address = address
        self._context = context
        self._deadline = time.monotonic() + timeout
        self.has_sent = False

    def connect(self) -> None:
        connected = self._dialled()
        if self._context is not None:
            self._context.sslsocket_class = _TimedTlsSocket
            connected.hurry()
            with closing(connected):  # the TLS socket takes over its descriptor
                # The context makes a socket of its `sslsocket_class`, which its type does not say.
                connected = self._context.wrap_socket(connected, server_hostname=self._server_name)  # type: ignore[assignment]
            connected.deadline = self._deadline
        self.sock = connected

    def _dialled(self) -> _TimedSocket:
        """Connect to the first address that works."""
        address, kind = self._address, socket.SOCK_STREAM
        found: list[Any] = (
            [(socket.AF_UNIX, kind, 0, "", str(address.path))]
            if isinstance(address, SocketFile)
            else socket.getaddrinfo(address.host, address.port, 0, kind)
        )
        failure = OSError("it has no address")
        for family, _, protocol, _, target in found:
            connected = _TimedSocket(family, kind, protocol)
            connected.deadline = self._deadline
            try:
                connected.connect(target)
                return connected
            except OSError as exc:
                connected.close()
                failure = exc
        raise failure

    def send(self, data: Any) -> None:
        if self.sock is None:
            self.connect()
        self.has_sent = True
        super().send(data)


def within(name: str) -> str:
    """Escape a name as one segment of a path."""
    return quote(name, safe="", errors="surrogateescape")


def _document(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_problem(body: Mapping[str, Any]) -> bool:
    return isinstance(body.get("error"), str) and isinstance(body.get("message"), str)

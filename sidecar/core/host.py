"""The host that a request names, and whether a listener answers to it. No I/O.

The authority of a request is untrusted input, like its path. Some backends rebuild the URL from the authority
(`scheme://`, Host, target) and parse it again. Such a backend reads `Host: x/recovery/execute?` as a path,
and `Host: u@x` as a user. Rules 1 to 3 prevent this:

1. Every authority that a request names, in Host and in a target of the absolute form, is exactly one
   `name [":" port]`. A name has only characters at which no URL parser splits (the unreserved ones of
   RFC 3986), or is an IPv6 address in brackets, without a zone. Percent-encoding is refused, because a second
   parser would decode it.
2. All rules apply to both places. By RFC 9112 (3.2.2) the absolute form replaces Host, but many backends
   read Host all the same.
3. An HTTP/1.0 request may omit Host. Every other version needs one.

A well-formed name can still be forged. A web page whose name resolves to 127.0.0.1 (DNS rebinding) reaches a
listener on loopback, with the page's own name in Host. A listener that relies on loopback for authentication
therefore answers only to loopback names and to its configured names:

4. The loopback names are 127.0.0.0/8, ::1, `localhost` and names that end in `.localhost`, because no
   resolver may assign these names to other addresses (RFC 6761, 6.3). 0.0.0.0 is not a loopback name,
   although systems connect it to loopback.
5. Names are compared without the port, in any case, and without the dot that ends a fully qualified name.

An origin belongs to the listener itself if scheme, name and port are equal. A missing port is the default of
the scheme (RFC 6454, 5). A dot at the end of the name counts here, as it does for browsers.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sidecar.core.cache import Cache

# The characters of a name, and of an IPv6 address in brackets. At none of them a URL parser splits.
NAME = r"[A-Za-z0-9._~-]+"
BRACKETED = r"\[[0-9A-Fa-f:.]+\]"

_HOST = re.compile(rf"(?P<name>{NAME}|{BRACKETED})(?::(?P<port>[0-9]{{1,5}}))?")
_ABSOLUTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://(?P<authority>[^/?#]*)")
# The authorities whose host is cached: the most of them, and the most characters of one.
MAX_HOSTS = 1024
MAX_HOST_CHARS = 256
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Host:
    """One well-formed authority. `name` is in lower case; an IPv6 address is compressed and in brackets."""

    name: str
    port: int | None

    @classmethod
    def parse(cls, text: str) -> Host | None:
        """The host that a Host header or the authority of a target names, None if it is not well-formed."""
        return _hosts[text]

    @property
    def bare(self) -> str:
        """The name in the form that is compared."""
        return self.name.removesuffix(".")

    def is_loopback(self) -> bool:
        """Whether the name can only mean this machine."""
        bare = self.bare
        *labels, top = bare.split(".")
        if top == "localhost" and all(labels):
            return True
        try:
            if not bare.startswith("["):
                return ipaddress.IPv4Address(bare).is_loopback
            address = ipaddress.IPv6Address(bare[1:-1])
        except ValueError:
            return False
        # Before version 3.13, Python does not report ::ffff:127.0.0.1 as loopback.
        return address.is_loopback or (address.ipv4_mapped is not None and address.ipv4_mapped.is_loopback)

    def is_origin(self, origin: str, scheme: str) -> bool:
        """Whether an Origin header names exactly this host under this scheme."""
        before, separator, rest = origin.partition("://")
        other = Host.parse(rest) if separator and before.lower() == scheme else None
        return other is not None and (other.name, other._port(scheme)) == (self.name, self._port(scheme))

    def _port(self, scheme: str) -> int:
        return _DEFAULT_PORTS[scheme] if self.port is None else self.port


def _host_of(text: str) -> Host | None:
    found = _HOST.fullmatch(text)
    if found is None:
        return None
    name = found["name"].lower()
    if name.startswith("["):
        try:
            name = f"[{ipaddress.IPv6Address(name[1:-1])}]"
        except ValueError:
            return None
    return Host(name, None if found["port"] is None else int(found["port"]))


_hosts = Cache(_host_of, max_entries=MAX_HOSTS, max_size=MAX_HOST_CHARS)


def hosts_of(method: str, target: str, values: Sequence[str], *, needed: bool) -> tuple[Host, ...] | str:
    """The hosts that a request names, or a clause that says what is wrong.

    `values` are the values of all Host headers. `needed` says whether the request must have one. The result
    is empty for an HTTP/1.0 request without Host.
    """
    if len(values) > 1:
        return "it has more than one Host"
    if needed and not values:
        return "it has no Host"
    authorities = _authorities(method, target)
    if authorities is None:
        return "its target is neither a path nor an absolute URL"
    hosts: list[Host] = []
    for text in (*values, *authorities):
        host = _hosts[text]
        if host is None:
            place = "its Host" if len(hosts) < len(values) else "the authority of its target"
            return f"{place} is not exactly one name or IP address, with or without a port"
        hosts.append(host)
    return tuple(hosts)


def _authorities(method: str, target: str) -> tuple[str, ...] | None:
    """The authority in a target, empty if it has none, or None if the target has no known form."""
    if method == "CONNECT":
        return (target,)
    if target.startswith("/") or target == "*":
        return ()
    found = _ABSOLUTE.match(target)
    return None if found is None else (found["authority"],)


def answers_to(host: Host, names: Collection[str]) -> bool:
    """Whether a listener with these configured names, each in the form of `Host.bare`, answers to a host."""
    return host.is_loopback() or host.bare in names

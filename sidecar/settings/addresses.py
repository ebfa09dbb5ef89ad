"""Where something listens: a host and a port, or a socket in the file system."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

_ENDPOINT = re.compile(r"(?:\[(?P<six>[^\[\]]+)\]|(?P<host>[A-Za-z0-9._-]+))(?::(?P<port>[0-9]{1,5}))?")


@dataclass(frozen=True, slots=True)
class Listen:
    """A host and a port. Port 0 is any free port; an IPv6 host is kept without its brackets."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Listen:
        """`host:port` or `[::1]:port`. Raises ValueError."""
        host, port = endpoint(text)
        if port is None:
            raise ValueError("expects host:port; write the port, too")
        return cls(host, port)

    def is_loopback(self) -> bool:
        """Whether only this host can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def is_certain(self) -> bool:
        """Whether it is known before something listens there."""
        return self.port != 0

    def is_callable(self) -> bool:
        """Whether it is one address that a client can connect to."""
        try:
            return self.is_certain() and not ipaddress.ip_address(self.host).is_unspecified
        except ValueError:
            return self.is_certain()

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class SocketFile:
    """A Unix domain socket, which only this host reaches; who may, the modes of file and folders say."""

    path: Path

    def is_loopback(self) -> bool:
        return True

    def is_certain(self) -> bool:
        return True

    def __str__(self) -> str:
        return f"unix:{self.path}"


Address = Listen | SocketFile


def endpoint(text: str) -> tuple[str, int | None]:
    """The host without brackets, and the port if there is one. Raises ValueError."""
    found = _ENDPOINT.fullmatch(text)
    if not found:
        raise ValueError('expects host:port, for example "127.0.0.1:8000" or "[::1]:8000"')
    host = found["six"] or found["host"]
    try:
        if found["six"]:
            ipaddress.IPv6Address(host)
        elif re.fullmatch(r"[0-9.]+", host):
            ipaddress.IPv4Address(host)
    except ValueError as exc:
        raise ValueError("names no valid IP address; correct it, or give a host name") from exc
    port = None if found["port"] is None else int(found["port"])
    if port is not None and port > 65_535:
        raise ValueError("names a port above 65535; ports go from 0 to 65535")
    return host, port

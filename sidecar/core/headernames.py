"""Headers that end at the sidecar, by name: those of one connection, and those that only the sidecar sends.

No fact can be read from them, because the backend would never see what was judged.
"""

from __future__ import annotations

from typing import Final

from sidecar.core.targetheaders import read_as

# RFC 9110, section 7.6.1. Transfer-Encoding is hop-by-hop too, because each side frames the message anew, and
# trailers are not forwarded.
HOP_BY_HOP: Final = frozenset(
    {
        "connection",
        "http2-settings",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)


def is_our_own(name: str) -> bool:
    """Whether a careless server could read the name as one that only the sidecar may send."""
    return read_as(name).startswith("scopegate-")


def ends_here(name: str) -> bool:
    """Whether a header of this name never reaches the backend as the client sent it."""
    return name.lower() in HOP_BY_HOP or is_our_own(name)

"""A trusted proxy before the sidecar: the peers that are believed, and the caller that their headers name."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from sidecar.auth.failure import AuthFailure
from sidecar.auth.identity import Identity
from sidecar.core.facts import IDENTIFIER_RULE, is_identifier
from sidecar.settings.auth import Network

UNIX = "unix"
# The peers whose trust is remembered. The networks never change, so forgetting all of them is enough.
MOST_PEERS = 4_096
_BLANKS = " \t"


class TrustedProxies:
    """Believes what the headers of a proxy say if the connection comes from a trusted peer."""

    def __init__(self, trusted: Sequence[Network]) -> None:
        self._networks = tuple(each for each in trusted if not isinstance(each, str))
        self._trusts_unix = UNIX in trusted
        self._known: dict[str, bool] = {}

    def trusts(self, peer: str) -> bool:
        """Whether a peer is believed: an IP address as text, or `unix`.

        An IPv4 address that is mapped into IPv6 counts as IPv4. Any other text is not believed.
        """
        found = self._known.get(peer)
        if found is None:
            if len(self._known) >= MOST_PEERS:
                self._known.clear()
            found = self._known[peer] = self._is_trusted(peer)
        return found

    def _is_trusted(self, peer: str) -> bool:
        if peer == UNIX:
            return self._trusts_unix
        try:
            address = ipaddress.ip_address(peer.partition("%")[0])
        except ValueError:
            return False
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return any((mapped or address) in network for network in self._networks)

    def identity(self, ids: Sequence[str], groups: Sequence[str]) -> Identity | AuthFailure:
        """The caller that a trusted proxy names, by all values of its two headers.

        Either header may stand there once. An id with a comma is refused, because a proxy on the way may have
        joined two headers into one, and a client can have sent the first of them. Without a header of groups
        the proxy does not say; an empty one says that there are none.
        """
        if len(ids) != 1 or "," in ids[0]:
            return AuthFailure("proxy", "the header of the trusted proxy must name exactly one caller")
        if len(groups) > 1:
            return AuthFailure("proxy", "the groups header of the trusted proxy must stand there once")
        found = tuple(
            dict.fromkeys(
                group for text in groups for each in text.split(",") if (group := each.strip(_BLANKS))
            )
        )
        if not all(map(is_identifier, found)):
            return AuthFailure("proxy", f"each group of the trusted proxy must be {IDENTIFIER_RULE}")
        return Identity(id=ids[0].strip(_BLANKS), groups=found if groups else None)

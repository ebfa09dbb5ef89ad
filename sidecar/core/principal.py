"""A principal: who asks, how that was established, and what a record says of it. Values only."""

from __future__ import annotations

from typing import Any, Literal

from sidecar.core.valueclass import valueclass

PrincipalKind = Literal["human", "service", "agent"]
# How a principal was established: the names in records and metrics. `none`: it presented no credential.
Method = Literal["tokens", "jwt", "mtls", "proxy", "none"]

ANONYMOUS_ID = "anonymous"
DEFAULT_TENANT = "default"


@valueclass
class Principal:
    """Who asks. `id` is unique over all methods: the same id from two methods is one person.

    The tenant binds a principal that was established by a method. Without one it is not looked at.
    """

    id: str
    kind: PrincipalKind = "service"
    groups: tuple[str, ...] = ()
    tenant_id: str = DEFAULT_TENANT
    method: Method = "none"

    @property
    def is_authenticated(self) -> bool:
        """Whether a method established it. No method can establish `anonymous`."""
        return self.method != "none"

    def __hash__(self) -> int:  # it never changes
        return hash(self.id)

    def to_dict(self) -> dict[str, Any]:
        """The principal as the envelope of a record shows it."""
        return {"id": self.id, "kind": self.kind, "method": self.method}


# A caller that presents nothing.
ANONYMOUS = Principal(id=ANONYMOUS_ID)

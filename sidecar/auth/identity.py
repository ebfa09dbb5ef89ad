"""What a credential itself says of its holder."""

from __future__ import annotations

from sidecar.core.principal import DEFAULT_TENANT, Method, Principal, PrincipalKind
from sidecar.core.valueclass import valueclass


@valueclass
class Identity:
    """The holder of a credential. None: the credential does not say.

    `expires_at` is in microseconds since 1970; the identity holds before that time. None: it has no end.
    """

    id: str
    kind: PrincipalKind | None = None
    groups: tuple[str, ...] | None = None
    tenant_id: str | None = None
    expires_at: int | None = None

    def principal(self, method: Method) -> Principal:
        """The principal that this is, with defaults for what the credential does not say."""
        return Principal(
            id=self.id,
            kind=self.kind or "service",
            groups=self.groups or (),
            tenant_id=self.tenant_id or DEFAULT_TENANT,
            method=method,
        )

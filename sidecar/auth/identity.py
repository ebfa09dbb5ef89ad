"""What a credential itself says of its holder. The principals file says the rest."""

from __future__ import annotations

from sidecar.core.principal import PrincipalKind
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

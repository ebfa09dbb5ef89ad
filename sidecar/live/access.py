"""What the methods of authentication and the roles in force leave open, in one sentence."""

from __future__ import annotations

from sidecar.live.snapshot import Snapshot

NO_METHOD = (
    "No method of authentication is configured: every caller is anonymous and may do everything, and a scope "
    "can be spent by everyone who knows its scope_id."
)
NO_ROLES = "The policies list no roles:, so every call that needs a role is refused with 403."
UNUSED_ROLES = "The roles: of the policies have no effect."


def warning_of(snapshot: Snapshot) -> str | None:
    """The sentence, or None if callers are authenticated and hold roles."""
    listed = snapshot.policies is not None and bool(snapshot.policies.roles.holders)
    if not snapshot.methods.names:
        return f"{NO_METHOD} {UNUSED_ROLES}" if listed else NO_METHOD
    return None if listed else NO_ROLES

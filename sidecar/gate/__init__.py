"""The path of a gated request: admission, forwarding and settlement, and the grants that it consumes."""

__all__ = ["deadlines", "execution", "grants", "messages", "observer", "places", "refusal_log", "settlement"]

"""The data listener: gated requests, pass-through requests, and the answers to both."""

__all__ = ["passthrough", "plane", "trial"]

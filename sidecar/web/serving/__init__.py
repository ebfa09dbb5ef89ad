"""Listeners and connections: accepting, TLS, parsing requests, and the access log."""

__all__ = ["accesslog", "body", "connections", "hosts", "listener"]

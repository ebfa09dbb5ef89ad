"""Listeners and connections: accepting, TLS, parsing requests, and the access log."""

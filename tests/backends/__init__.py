"""Backends on real frameworks, which report on their standard output what their own routers execute."""

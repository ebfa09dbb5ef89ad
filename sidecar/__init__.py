"""Scopegate: a recovery action without a valid execution scope is invalid by definition."""

__version__ = "0.4.0"

"""The environment variables of commands. They begin as those of keys do, and name no key."""

from __future__ import annotations

CONFIG = "SCOPEGATE_CONFIG"
TOKEN_FILE = "SCOPEGATE_TOKEN_FILE"
TOKEN = "SCOPEGATE_TOKEN"

OF_COMMANDS = frozenset({CONFIG, TOKEN_FILE, TOKEN})

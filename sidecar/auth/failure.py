"""A credential that was presented and is not accepted."""

from __future__ import annotations

from dataclasses import dataclass

from sidecar.core.principal import Method


@dataclass(frozen=True, slots=True)
class AuthFailure:
    """Why a credential is not accepted. The message never says whether a token exists, and repeats no part
    of a credential."""

    method: Method
    message: str

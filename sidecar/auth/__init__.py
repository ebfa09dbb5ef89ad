"""Who asks: principals by token, JWT, client certificate or trusted proxy."""

__all__ = ["certificates", "failure", "identity", "jwks", "jwt", "methods", "principals", "proxy"]

"""Who asks: principals by JSON Web Token, client certificate or trusted proxy."""

__all__ = ["certificates", "failure", "identity", "jwks", "jwt", "methods", "proxy"]

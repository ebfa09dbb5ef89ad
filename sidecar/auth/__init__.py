"""Who asks: principals by token, JWT, client certificate or trusted proxy."""

__all__ = ["failure", "identity", "methods", "principals"]

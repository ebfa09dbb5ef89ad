"""Readers for files and bytes: YAML, strict JSON, keys, certificates and signatures."""

__all__ = ["faults", "jsonvalue", "keyfiles", "signing", "strictjson", "tls", "yamlfile"]

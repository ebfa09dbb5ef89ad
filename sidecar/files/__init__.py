"""Readers for files and bytes: YAML, strict JSON, keys, certificates and signatures."""

"""What is read from files and bytes: YAML, strict JSON, keys, certificates and signatures."""

"""The path of a gated request: admission, forwarding and settlement, and the grants that it consumes."""

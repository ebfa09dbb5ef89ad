"""One gated request from top to bottom: admit, forward, settle; and the grants that it spends."""

"""`scopegate`. Exit codes: 0 well, 1 failed, 2 usage or configuration, 3 unreachable, 4 tampering."""

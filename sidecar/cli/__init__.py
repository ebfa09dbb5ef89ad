"""`scopegate`. Exit codes: 0 success, 1 failure, 2 usage or configuration, 3 unreachable, 4 tampering."""

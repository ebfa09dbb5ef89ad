"""The `scopegate` command. Exit codes: 0 well, 1 failed, 2 usage or configuration, 4 tampering found."""

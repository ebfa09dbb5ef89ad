"""The store: one transaction loads the rows that commands name, saves the changes and appends the records."""

__all__ = [
    "attestation",
    "backup",
    "base",
    "batch",
    "checkpoints",
    "crash",
    "export",
    "lists",
    "logfile",
    "sqlite",
    "verify",
]

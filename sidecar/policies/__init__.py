"""Policy files: reading them, compiling conditions, testing them, and replaying the log under another set."""

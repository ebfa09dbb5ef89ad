"""Policy files: reading them, compiling conditions, testing them, and replaying the log under another set."""

__all__ = ["files", "gaterecords", "replay", "testing"]

"""What the sidecar adds to asyncio's event loop: cheap deadlines, and reads that allocate little."""

__all__ = ["receiving", "timers"]

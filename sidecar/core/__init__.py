"""The pure core: judging, and nothing else. No clock, no I/O, no framework."""

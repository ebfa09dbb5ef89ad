"""The pure core judges requests. It has no clock, no I/O and no framework."""

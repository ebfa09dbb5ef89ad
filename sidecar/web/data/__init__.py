"""The data listener: what is gated, what passes through, and the answers to both."""

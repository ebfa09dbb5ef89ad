"""The HTTP faces: the data listener (gate, scopes, pass-through), admin and ops. Thin adapters."""

"""The HTTP adapters: the data listener (gate, scopes, pass-through), the admin and the ops listener."""

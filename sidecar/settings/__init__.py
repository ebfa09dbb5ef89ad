"""The configuration: its keys and values, where they come from, and the JSON schema that editors use."""

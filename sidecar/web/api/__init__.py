"""The sidecar's own calls (scopes, decisions, executions, status, health) and their OpenAPI document."""

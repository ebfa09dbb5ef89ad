"""The OpenAPI document, and the tables of calls that it is built from."""

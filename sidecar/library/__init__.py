"""The implementation of `sidecar.scoped_execution` and `sidecar.decisions`: Scopegate in a Python program."""

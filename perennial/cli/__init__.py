"""The `perennial` command: one thin file per command, each over a Python function of the same shape."""

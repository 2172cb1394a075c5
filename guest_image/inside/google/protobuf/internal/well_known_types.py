# mypy: ignore-errors
"""Extra methods for classes like Timestamp; nobody calls them in the guest."""

WKTBASES = {}

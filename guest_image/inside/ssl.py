# mypy: ignore-errors
raise ImportError("the guest has no TLS")

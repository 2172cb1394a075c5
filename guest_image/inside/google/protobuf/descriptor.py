# mypy: ignore-errors
_USE_C_DESCRIPTORS = True

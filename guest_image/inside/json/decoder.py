# mypy: ignore-errors
"""The error, where the scanner looks for it."""


class JSONDecodeError(ValueError):
    def __init__(self, msg, doc, pos):
        super().__init__(f"{msg}: char {pos}")

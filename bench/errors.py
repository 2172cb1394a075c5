"""What can keep a measurement from being made."""


class BenchError(Exception):
    """A measurement is impossible here or went wrong; the text says which and what to do."""

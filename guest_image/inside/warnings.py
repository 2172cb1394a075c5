# mypy: ignore-errors
"""Warnings go to stderr, once, through the part of the machinery that is written in C."""

import sys
from _warnings import _defaultaction, _onceregistry, filters, warn, warn_explicit

__all__ = ["_defaultaction", "_onceregistry", "filters", "simplefilter", "warn", "warn_explicit"]


def _showwarnmsg(message):
    sys.stderr.write(f"{message.filename}:{message.lineno}: {message.category.__name__}: {message.message}\n")


def simplefilter(action, category=Warning, lineno=0, append=False):
    pass

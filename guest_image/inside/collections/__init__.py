# mypy: ignore-errors
"""The containers that are written in C, and a light namedtuple."""

import _collections_abc
import sys
from _collections import OrderedDict, defaultdict, deque

sys.modules["collections.abc"] = abc = _collections_abc

__all__ = ["OrderedDict", "defaultdict", "deque", "namedtuple"]


def namedtuple(name, fields, *, defaults=(), module=None):
    from typing import _NamedTupleMeta

    names = fields.replace(",", " ").split() if isinstance(fields, str) else list(fields)
    namespace = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True))
    namespace["__annotations__"] = dict.fromkeys(names)
    return _NamedTupleMeta(name, (), namespace)

# mypy: ignore-errors
from _heapq import *  # noqa: F403

"""What a measurement gives: rows of numbers, each beside the numbers it is to be compared with."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the result.

    `ratio` compares the medians of `values` and of `base`, which were measured in the same run; `to` says what
    the base is. An aim is an upper limit, of the ratio or (for sizes) of the median itself, or (for speeds) a lower one
    of either.
    """

    name: str
    unit: str
    values: Sequence[float]
    to: str = ""
    base: Sequence[float] = ()
    aim_ratio: float | None = None
    aim_value: float | None = None
    aim_least: float | None = None
    aim_least_ratio: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def ratio(self) -> float | None:
        """None when there is nothing to compare with."""
        base = statistics.median(self.base) if self.base else 0.0
        return self.median / base if base else None

    @property
    def meets_aim(self) -> bool | None:
        """None when there is no aim."""
        if self.aim_least is not None:
            return self.median >= self.aim_least
        if self.aim_value is not None:
            return self.median <= self.aim_value
        if self.ratio is None:
            return None
        if self.aim_least_ratio is not None:
            return self.ratio >= self.aim_least_ratio
        if self.aim_ratio is not None:
            return self.ratio <= self.aim_ratio
        return None


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile: a number that was measured, not one between two of them."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]

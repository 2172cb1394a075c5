"""Medians, percentiles, ratios and aims of the bench's rows."""

from __future__ import annotations

import pytest

from bench.rows import Row, percentile


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([5.0], 95, 5.0),
        ([3.0, 1.0, 2.0], 50, 2.0),
        ([float(n) for n in range(1, 21)], 95, 19.0),
        ([1.0, 2.0], 100, 2.0),
    ],
)
def test_percentile_is_a_measured_value(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == expected


def test_ratio_is_of_the_medians() -> None:
    row = Row(name="a", unit="s", values=[4.0, 100.0, 2.0], base=[1.0, 2.0, 50.0])
    assert row.ratio == 2.0


@pytest.mark.parametrize("base", [[], [0.0]])
def test_no_base_no_ratio(base: list[float]) -> None:
    row = Row(name="a", unit="s", values=[1.0], base=base, aim_ratio=2.0)
    assert row.ratio is None
    assert row.meets_aim is None


@pytest.mark.parametrize(
    ("aim_ratio", "aim_value", "expected"),
    [(2.0, None, True), (1.9, None, False), (None, 10.0, True), (None, 9.9, False), (None, None, None)],
)
def test_aims_are_upper_limits(
    aim_ratio: float | None, aim_value: float | None, expected: bool | None
) -> None:
    row = Row(name="a", unit="s", values=[10.0], base=[5.0], aim_ratio=aim_ratio, aim_value=aim_value)
    assert row.meets_aim is expected


@pytest.mark.parametrize(("aim_least", "expected"), [(10.0, True), (10.1, False)])
def test_speeds_have_lower_limits(aim_least: float, expected: bool) -> None:
    assert Row(name="a", unit="MB/s", values=[10.0], aim_least=aim_least).meets_aim is expected


@pytest.mark.parametrize(("base", "expected"), [([10.0], True), ([10.6], False), ([], None)])
def test_speeds_have_lower_limits_of_their_ratio(base: list[float], expected: bool | None) -> None:
    row = Row(name="a", unit="MB/s", values=[10.0], base=base, aim_least_ratio=0.95)
    assert row.meets_aim is expected

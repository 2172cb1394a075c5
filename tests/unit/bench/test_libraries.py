"""How the numbers of the library benches become rows."""

from __future__ import annotations

from bench.libraries import rows


def test_numbers_stand_beside_their_floor() -> None:
    found = {
        "floor": {"mb_per_s": 1000.0, "mb_per_cpu_s": 500.0},
        "to_host": {"mb_per_s": 250.0, "mb_per_cpu_s": 250.0, "cpu_ratio_to_floor": 2.0},
        "ratio_x": 3.0,
        "note": "not a number",
        "mebibytes": 256,
        "round_trip": 0.5,
    }
    assert [(row.name, row.median, row.ratio, row.to) for row in rows(found, to="plain")] == [
        ("to_host_mb_per_s", 250.0, 0.25, "plain"),
        ("to_host_mb_per_cpu_s", 250.0, 0.5, "plain"),
        ("round_trip", 0.5, None, ""),
    ]

"""The parts below the shim by themselves, without a machine: `ttrpc_bench` and `vsock_bench` as rows.

Each module's `run()` gives numbers by name, or groups of them. `floor_NAME` is what `..._NAME` is compared with.
Left out here are whole numbers, which say how much was done, and ratios that the modules have worked out themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench import ttrpc_bench, vsock_bench
from bench.rows import Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from bench.lab import Lab

_FLOOR = "floor_"


def measure_ttrpc(lab: Lab, runs: int, step: Callable[[str], None]) -> list[Row]:
    """The module decides by itself how often it does what."""
    step("calls over a socket pair")
    return rows(ttrpc_bench.run(), to="bare asyncio")


def measure_vsock(lab: Lab, runs: int, step: Callable[[str], None]) -> list[Row]:
    """The module decides by itself how often it does what."""
    step("the device with a simulated guest")
    return rows(vsock_bench.run(), to="a socket pair")


def rows(found: Mapping[str, object], *, to: str) -> list[Row]:
    """Numbers as rows, each with its floor when it has one."""
    numbers = dict(_flat(found))
    floors = {name.removeprefix(_FLOOR): value for name, value in numbers.items() if name.startswith(_FLOOR)}
    result = []
    for name, value in numbers.items():
        if name.startswith(_FLOOR) or "ratio" in name:
            continue
        floor = next((floors[kind] for kind in floors if name.endswith(f"_{kind}")), None)
        if floor is None:
            result.append(Row(name=name, unit="", values=[value]))
        else:
            result.append(Row(name=name, unit="", values=[value], to=to, base=[floor]))
    return result


def _flat(found: Mapping[str, object], group: str = "") -> Iterator[tuple[str, float]]:
    for name, value in found.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{group}{name}_")
        elif isinstance(value, float):
            yield f"{group}{name}", value

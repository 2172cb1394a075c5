"""The result as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import os
import platform
import time
from typing import TYPE_CHECKING, Any

from rich.table import Table

from bench.rows import percentile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from bench.rows import Row

Results = dict[str, list["Row"]]


def host() -> dict[str, Any]:
    """What has to be known of the machine to read the numbers. `load` is the average of the last minute."""
    return {
        "machine": platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
    }


def table(part: str, rows: Sequence[Row]) -> Table:
    """One part's rows."""
    result = Table(title=part, title_justify="left", title_style="bold", expand=False)
    result.add_column("what")
    for name in ("median", "min", "p95", "unit", "ratio"):
        result.add_column(name, justify="left" if name == "unit" else "right")
    result.add_column("to")
    result.add_column("aim")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
        numbers = (row.median, min(row.values), percentile(row.values, 95))
        result.add_row(row.name, *(f"{number:.4g}" for number in numbers), row.unit, ratio, row.to, _aim(row))
    return result


def write_json(
    path: Path, *, runs: int, before: Mapping[str, Any], results: Results, notes: Sequence[str]
) -> None:
    """Everything, the single values included. `before` is `host()` from the beginning."""
    document = {
        "host": dict(before),
        "load_after": round(os.getloadavg()[0], 2),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "runs": runs,
        "notes": list(notes),
        "parts": {part: {row.name.strip(): _as_json(row) for row in rows} for part, rows in results.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def _aim(row: Row) -> str:
    if row.meets_aim is None:
        return ""
    if row.aim_least is not None:
        limit = f"≥ {row.aim_least:g} {row.unit}"
    elif row.aim_least_ratio is not None:
        limit = f"≥ {row.aim_least_ratio:g}"
    else:
        limit = f"≤ {row.aim_ratio:g}" if row.aim_value is None else f"≤ {row.aim_value:g} {row.unit}"
    return f"[green]met[/] ({limit})" if row.meets_aim else f"[red]missed[/] ({limit})"


def _as_json(row: Row) -> dict[str, Any]:
    return {
        "unit": row.unit,
        "n": len(row.values),
        "median": row.median,
        "min": min(row.values),
        "p95": percentile(row.values, 95),
        "ratio": row.ratio,
        "to": row.to,
        "aim_ratio": row.aim_ratio,
        "aim_value": row.aim_value,
        "aim_least": row.aim_least,
        "aim_least_ratio": row.aim_least_ratio,
        "values": list(row.values),
    }

"""A plugin for the pytest inside of the machine: limits for what is emulated, and no skips that hide a lack.

Tests skip what a host lacks. This machine is there for what others lack, so a skip is a failure there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

SLOWER = 10


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        mark = item.get_closest_marker("timeout")
        limit_s = mark.args[0] if mark and mark.args else float(config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(limit_s * SLOWER), append=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped:
        reason = call.excinfo.value if call.excinfo is not None else "marked so"
        report.outcome = "failed"
        report.longrepr = f"skipped on a machine that has everything: {reason}"
    return report

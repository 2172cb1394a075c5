"""A part of a test in a mount namespace of its own: nothing that it mounts is seen outside or outlives it."""

from __future__ import annotations

import os
import traceback
from typing import TYPE_CHECKING

import pytest

from shim import mounts

if TYPE_CHECKING:
    from collections.abc import Callable


def in_mount_namespace(work: Callable[[], None]) -> None:
    """Run `work` in a forked child. Skips without CAP_SYS_ADMIN; fails with the child's traceback."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code, text = 0, ""
        try:
            try:
                mounts.enter_private_mount_namespace()
            except PermissionError:
                code = 77
            else:
                work()
        except BaseException:
            code, text = 1, traceback.format_exc()
        os.write(writer, text.encode()[-60000:])
        os._exit(code)
    os.close(writer)
    with open(reader) as file:
        text = file.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == 77:
        pytest.skip("needs CAP_SYS_ADMIN for a mount namespace")
    assert code == 0, text

"""Which calls are told at which level."""

from __future__ import annotations

from typing import Any

import pytest
from structlog.testing import capture_logs

from shim import rpc_log
from shim.api.gen import task_v3_pb2 as pb
from ttrpc import Call


@pytest.mark.parametrize(
    ("method", "request_", "fails", "level"),
    [
        ("Start", pb.StartRequest(id="c"), False, "info"),
        ("Start", pb.StartRequest(id="c", exec_id="e"), False, "debug"),
        ("Start", pb.StartRequest(id="c", exec_id="e"), True, "info"),
        ("Delete", pb.DeleteRequest(id="c"), False, "info"),
        ("Exec", pb.ExecProcessRequest(id="c", exec_id="e"), False, "debug"),
        ("State", pb.StateRequest(id="c"), True, "debug"),
        ("Wait", pb.WaitRequest(id="c", exec_id="e"), False, "debug"),
        ("ResizePty", pb.ResizePtyRequest(id="c"), False, "debug"),
    ],
)
async def test_level(method: str, request_: Any, fails: bool, level: str) -> None:
    async def handler(request: Any, call: Call) -> str:
        if fails:
            raise LookupError("no")
        return "answer"

    with capture_logs() as lines:
        call = Call("task", method, {}, None)
        if fails:
            with pytest.raises(LookupError):
                await rpc_log.logged(call, request_, handler)
        else:
            assert await rpc_log.logged(call, request_, handler) == "answer"
    (line,) = lines
    assert (line["log_level"], line["rpc"], line["container"]) == (level, method, "c")
    assert line["ended"] == ("LookupError: no" if fails else "ok")

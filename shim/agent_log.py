"""The agent's log stream, passed on into ours: JSON lines from the guest, which may write anything."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from hypervisor.qemu.machine import Machine

log = structlog.get_logger()

_LINE_LIMIT = 16 * 1024
# Kata's agent abbreviates; anything else counts as info.
_LEVELS = {
    "TRCE": logging.DEBUG,
    "DEBG": logging.DEBUG,
    "WARN": logging.WARNING,
    "ERRO": logging.ERROR,
    "CRIT": logging.CRITICAL,
}


async def forward(machine: Machine, port: int, least: int = logging.DEBUG) -> None:
    """Read the agent's log until it ends; lines below the level `least` are left out. A guest without a log stream is
    no error.
    """
    try:
        sock = await machine.vsock.connect(port)
        reader, writer = await asyncio.open_connection(sock=sock, limit=_LINE_LIMIT)
    except OSError as err:
        log.debug("agent_log_unavailable", error=str(err))
        return
    try:
        while line := await _next_line(reader):
            _log_line(line, least)
    except OSError as err:
        log.debug("agent_log_ended", error=str(err))
    finally:
        writer.close()


async def _next_line(reader: asyncio.StreamReader) -> bytes:
    """One line with its end; a line over the limit comes in pieces. Empty at the end of the stream."""
    try:
        return await reader.readuntil(b"\n")
    except asyncio.IncompleteReadError as err:
        return err.partial
    except asyncio.LimitOverrunError as err:
        return await reader.readexactly(min(err.consumed, _LINE_LIMIT))


def _log_line(line: bytes, least: int) -> None:
    try:
        record = json.loads(line)
        level, message = str(record.get("level", "")), str(record.get("msg", ""))
        rest = {
            str(k): v for k, v in record.items() if k not in ("level", "msg", "ts", "version", "pid", "name")
        }
    except (ValueError, AttributeError, RecursionError):
        level, message, rest = "", line.decode(errors="replace").strip(), {}
    number = _LEVELS.get(level, logging.INFO)
    if number >= least:
        log.log(number, "guest_log", text=message, **({"details": rest} if rest else {}))

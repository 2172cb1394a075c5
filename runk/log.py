"""The log file that a caller names, in the two formats of other runtimes. Without one there is no log."""

from __future__ import annotations

import sys
import time

from oci_engine import json_text


class Log:
    """Lines are appended: callers let many calls share a file."""

    def __init__(self, path: str | None, *, json_lines: bool, debug: bool) -> None:
        self._path = path
        self._json = json_lines
        self._debug = debug

    def error(self, message: str) -> None:
        """To standard error as well, where people look."""
        print(f"runk: {message}", file=sys.stderr)  # noqa: T201
        self._write("error", message)

    def warning(self, message: str) -> None:
        print(f"runk: warning: {message}", file=sys.stderr)  # noqa: T201
        self._write("warning", message)

    def debug(self, message: str) -> None:
        if self._debug:
            self._write("debug", message)

    def _write(self, level: str, message: str) -> None:
        if not self._path:
            return
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        if self._json:
            line = json_text.dumps({"level": level, "msg": message, "time": now})
        else:
            line = f'time="{now}" level={level} msg={json_text.dumps(message)}'
        with open(self._path, "a") as file:
            file.write(line + "\n")

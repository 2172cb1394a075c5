"""The process that `exec` is to run: a file's, or the container's own with what the options change."""

from __future__ import annotations

from oci_engine import json_text
from oci_engine.capabilities import SETS
from oci_engine.errors import EngineError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runk.arguments import Options


def process_document(options: Options, spec: dict[str, object]) -> dict[str, object]:
    """As in `process` of a specification. Raises EngineError when there is nothing to run."""
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if options.process:
        try:
            with open(options.process) as file:
                document = json_text.loads(file.read())
        except (OSError, ValueError) as err:
            raise EngineError(f"--process {options.process}: {err}") from None
        if not isinstance(document, dict):
            raise EngineError(f"--process {options.process}: is no JSON object")
        return document | ({"terminal": True} if options.tty else {})
    if not command:
        raise EngineError("exec: neither a process file nor a command is given")
    first = spec["process"]
    assert isinstance(first, dict)
    document = {**first, "args": command, "terminal": options.tty}
    document.pop("consoleSize", None)
    if options.cwd:
        document["cwd"] = options.cwd
    document["env"] = [*(first.get("env") or ()), *options.env]
    if options.user:
        document["user"] = _user(options.user)
    if options.additional_gids:
        document["user"] = {**(document.get("user") or {}), "additionalGids": options.additional_gids}
    if options.no_new_privs:
        document["noNewPrivileges"] = True
    if options.apparmor:
        document["apparmorProfile"] = options.apparmor
    if options.process_label:
        document["selinuxLabel"] = options.process_label
    if options.cap:
        document["capabilities"] = _with_capabilities(document.get("capabilities"), options.cap)
    return document


def _user(text: str) -> dict[str, object]:
    uid, colon, gid = text.partition(":")
    if not uid.isdigit() or (colon and not gid.isdigit()):
        raise EngineError(f"--user: want UID or UID:GID in numbers, got {text!r}")
    return {"uid": int(uid), "gid": int(gid or 0)}


def _with_capabilities(given: object, more: list[str]) -> dict[str, list[str]]:
    sets = given if isinstance(given, dict) else {}
    return {
        name: sorted({*(sets.get(name) or ()), *(() if name in ("inheritable", "ambient") else more)})
        for name in SETS
    }

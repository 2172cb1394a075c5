"""The kernel command line: the words that are for the agent.

Words of Kata's agent that this one has no use for are told of, as the host's configuration asked for something by them.
"""

from __future__ import annotations

#: Kata's level names, which include logrus's, and ours.
LEVELS = {
    "trace": "trace", "debug": "debug", "info": "info", "warn": "warning", "warning": "warning",
    "error": "error", "err": "error", "critical": "critical", "crit": "critical", "fatal": "critical",
    "panic": "critical",
}  # fmt: skip
DEFAULT_PORT = 1024


class Settings:
    """What the command line says, with Kata's defaults. `problems` lists words that could not be read."""

    __slots__ = (
        "container_pipe_size",
        "hotplug_timeout_s",
        "log_level",
        "log_vport",
        "problems",
        "ready_vport",
        "server_addr",
    )

    def __init__(self) -> None:
        self.container_pipe_size = 0
        self.hotplug_timeout_s = 3
        self.log_level = "info"
        self.log_vport = 0
        self.ready_vport = 0
        self.server_addr = f"vsock://-1:{DEFAULT_PORT}"
        self.problems: list[str] = []


def parse(line: str) -> Settings:
    """Read a kernel command line. A bad value keeps the default and is reported in `problems`; no word of
    the command line may keep the guest from coming up, because then nobody could be told about it."""
    settings = Settings()
    for word in _words(line):
        name, _, value = word.partition("=")
        reader = _READERS.get(name)
        if reader is None:
            if name.startswith("agent."):
                settings.problems.append(f"{word}: this guest's agent has no such setting")
            continue
        field, read = reader
        try:
            setattr(settings, field, read(value))
        except ValueError as err:
            settings.problems.append(f"{word}: {err}")
    return settings


def port(address: str) -> int:
    """The vsock port of an address like "vsock://-1:1024". Raises ValueError for any other kind."""
    scheme, _, rest = address.partition("://")
    if scheme != "vsock":
        raise ValueError(f"want vsock://CID:PORT, got {address!r}")
    number = rest.rpartition(":")[2] if ":" in rest else str(DEFAULT_PORT)
    return _positive(number)


def _words(line: str) -> list[str]:
    """Split at blanks outside of double quotes, as the kernel does."""
    words, current, quoted = [], "", False
    for character in line.strip() + " ":
        if character == '"':
            quoted = not quoted
        elif character.isspace() and not quoted:
            if current:
                words.append(current)
            current = ""
        else:
            current += character
    return words


def _integer(value: str) -> int:
    if not value.isdigit():
        raise ValueError("want a whole number")
    return int(value)


def _positive(value: str) -> int:
    number = _integer(value)
    if number == 0:
        raise ValueError("want a number above 0")
    return number


def _level(value: str) -> str:
    if value.lower() not in LEVELS:
        raise ValueError(f"want one of {', '.join(LEVELS)}")
    return LEVELS[value.lower()]


def _address(value: str) -> str:
    port(value)
    return value


_READERS = {
    "agent.container_pipe_size": ("container_pipe_size", _integer),
    "agent.hotplug_timeout": ("hotplug_timeout_s", _positive),
    "agent.log": ("log_level", _level),
    "agent.log_vport": ("log_vport", _positive),
    "agent.server_addr": ("server_addr", _address),
    "kata_py.ready_vport": ("ready_vport", _positive),
}

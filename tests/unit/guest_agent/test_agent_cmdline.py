from __future__ import annotations

import pytest

from guest_agent.cmdline import parse, port


def test_the_defaults_are_katas() -> None:
    settings = parse("console=ttyS0 quiet panic=-1\n")
    assert settings.log_level == "info"
    assert settings.log_vport == 0
    assert settings.ready_vport == 0
    assert settings.server_addr == "vsock://-1:1024"
    assert settings.hotplug_timeout_s == 3
    assert settings.container_pipe_size == 0
    assert settings.problems == []


def test_words_for_the_agent() -> None:
    settings = parse(
        "agent.log=debug agent.log_vport=1025 agent.hotplug_timeout=10 agent.container_pipe_size=4096 "
        "kata_py.ready_vport=1030 agent.server_addr=vsock://-1:2048 agent.unknown=1 agent.devmode"
    )
    assert settings.log_level == "debug"
    assert (settings.log_vport, settings.ready_vport) == (1025, 1030)
    assert port(settings.server_addr) == 2048
    assert settings.hotplug_timeout_s == 10
    assert settings.container_pipe_size == 4096


def test_words_of_katas_agent_that_ask_for_what_is_not_here_are_told_of() -> None:
    words = ("agent.trace=true", "agent.debug_console", "agent.mem_agent_enable=1")
    assert parse(f"panic=1 {' '.join(words)} agent_x=1 psi=1").problems == [
        f"{word}: this guest's agent has no such setting" for word in words
    ]


@pytest.mark.parametrize(
    ("word", "level"),
    [
        ("trace", "trace"),
        ("WARN", "warning"),
        ("panic", "critical"),
        ("err", "error"),
        ("critical", "critical"),
    ],
)
def test_levels(word: str, level: str) -> None:
    assert parse(f"agent.log={word}").log_level == level


@pytest.mark.parametrize(
    "word",
    [
        "agent.log=loud", "agent.log_vport=0", "agent.log_vport=-1", "agent.log_vport=x", "agent.log_vport",
        "agent.hotplug_timeout=1.5", "agent.container_pipe_size=-1",
        "agent.server_addr=tcp://1", "agent.server_addr=vsock://-1:x",
    ],
)  # fmt: skip
def test_bad_values_keep_the_default_and_are_reported(word: str) -> None:
    settings = parse(f"{word} agent.hotplug_timeout=9")
    defaults = parse("agent.hotplug_timeout=9")
    (problem,) = settings.problems
    assert problem.startswith(f"{word}: ")
    for name in settings.__slots__:
        if name != "problems":
            assert getattr(settings, name) == getattr(defaults, name)


def test_quotes_and_the_last_word_wins() -> None:
    settings = parse('x="agent.log_vport=1 agent.log=debug" agent.log=error agent.log=warn')
    assert settings.log_vport == 0
    assert settings.log_level == "warning"


@pytest.mark.parametrize(
    ("address", "number"), [("vsock://-1:1024", 1024), ("vsock://3:99", 99), ("vsock://-1", 1024)]
)
def test_ports(address: str, number: int) -> None:
    assert port(address) == number

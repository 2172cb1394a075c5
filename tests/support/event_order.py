"""What containerd may rely on in the order of a container's events, checked on `StubPublisher.told`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class _Story:
    """What has been told so far; execs are gone from it once they are deleted."""

    words: set[str] = field(default_factory=set)
    execs: dict[str, str] = field(default_factory=dict)
    paused: bool = False


def check(told: list[str]) -> None:
    """Raises AssertionError, with the whole story, at the first event that comes too early, too late or twice."""
    story = _Story()
    for number, event in enumerate(told):
        word, _, exec_id = event.partition(" ")
        allowed = _exec_event(story, word, exec_id) if exec_id else _container_event(story, word)
        assert allowed, f"{event!r} may not follow {told[:number]}"


def _container_event(story: _Story, word: str) -> bool:
    first, ended = not story.words, bool(story.words & {"exit", "delete"})
    allowed = {
        "create": first,
        "start": not first and not ended and "start" not in story.words,
        "paused": "start" in story.words and not ended and not story.paused,
        "resumed": not ended and story.paused,
        "oom": not first and not ended,
        "exit": not first and not ended and "started" not in story.execs.values(),
        "delete": "exit" in story.words and "delete" not in story.words and not story.execs,
    }[word]
    story.words.add(word)
    story.paused = word == "paused" or (story.paused and word != "resumed")
    return allowed


def _exec_event(story: _Story, word: str, exec_id: str) -> bool:
    before = story.execs.get(exec_id)
    ended = "exit" in story.words
    allowed = {
        "execadded": before is None and bool(story.words) and not ended,
        "execstarted": before == "execadded" and not ended,
        "exit": before == "started" and not ended,
        "delete": before in ("execadded", "exit"),
    }[word]
    if word == "delete":
        story.execs.pop(exec_id, None)
    else:
        story.execs[exec_id] = "started" if word == "execstarted" else word
    return allowed and "delete" not in story.words

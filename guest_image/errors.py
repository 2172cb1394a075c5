"""What can go wrong while the guest image is made.

ImageError            the build cannot go on; the text names the step, the object and what to do
└── ToolFailed        a program of the distribution failed; the text quotes its command and its last line
"""

from __future__ import annotations


class ImageError(Exception):
    """The guest image cannot be built. The message is one line: what failed, on what, and what to try."""


class ToolFailed(ImageError):
    """A program we ran exited with an error; `said` are the lines that it wrote to stderr."""

    def __init__(self, message: str, said: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.said = said or (message,)

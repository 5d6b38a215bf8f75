"""What goes wrong with checkpoints, and how it is said."""

from __future__ import annotations


class CheckpointError(Exception):
    """A checkpoint cannot be read or written. The text names the file and what to do."""


def first_line(error: BaseException) -> str:
    """The start of an error's text, whose rest is often pages of traces."""
    return (str(error).strip() or repr(error)).splitlines()[0][:400]

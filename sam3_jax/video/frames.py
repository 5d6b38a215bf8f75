"""What a video is made of: numbered frames, each with its time, and what can be wrong with them."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

# Of a source that states none: what ffmpeg takes for a folder of pictures too.
DEFAULT_RATE = Fraction(25)


class VideoError(ValueError):
    """A video that cannot be used. The message, one line, names it, the frame and what to do."""


class Frame(NamedTuple):
    """One frame of a video.

    ``image`` is None for a frame that could not be read: use the picture before it, or go without.
    ``error`` then says why. A frame with both is damaged: the decoder filled in what it lacked.
    Frames of a file that come after either, up to the next key frame, may look wrong as well.
    """

    index: int  # from 0, in the order of display; missing frames count
    pts: int  # when it is shown, from the first frame on, in units of the source's time base
    time: float  # the same in seconds
    image: UInt8[np.ndarray, "h w 3"] | None  # RGB, upright
    error: str | None = None


@runtime_checkable
class FrameSource(Protocol):
    """What a kind of video has; :class:`~.reader.VideoSource` says what the attributes are."""

    name: str
    size: tuple[int, int]
    rate: Fraction
    time_base: Fraction
    length: int | None
    seekable: bool
    first: int  # the first frame that can still be had

    @property
    def problems(self) -> Mapping[Any, str]:
        """By kind, each once."""

    def frames(self, start: int) -> Generator[Frame, None, None]:
        """Frames from ``start`` on."""

    def count(self) -> int:
        """The exact number of frames."""


def no_such_frame(name: str, index: int, length: int | None) -> VideoError:
    """The error for a frame number that the video does not have; None: it has no known end."""
    there = "frames are" if length is None else f"the video has {length}:"
    last = "" if length is None else f" to {length - 1}"
    return VideoError(f"{name}: there is no frame {index}, {there} numbered from 0{last}")

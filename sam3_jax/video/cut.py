"""A part of a video, or every so manieth frame of it, as a video of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import NamedTuple

from sam3_jax.inference.prompts import PromptError
from sam3_jax.video.frames import Frame, VideoError, no_such_frame
from sam3_jax.video.reader import VideoSource


class Span(NamedTuple):
    """Frames ``start`` up to, but without, ``stop`` (None: the end), each ``step``-th of them."""

    start: int = 0
    stop: int | None = None
    step: int = 1

    def place(self, frame: int, name: str) -> int:
        """The number that a frame of the whole video has in the part.

        Raises:
          PromptError: when it is not in it.
        """
        inside = self.start <= frame and (self.stop is None or frame < self.stop)
        if not inside or (frame - self.start) % self.step:
            raise PromptError(
                f"{name}: frame {frame} is not among the frames that were chosen "
                f"({self.start}:{'' if self.stop is None else self.stop}:{self.step})"
            )
        return (frame - self.start) // self.step


def cut(video: VideoSource, span: Span) -> VideoSource:
    """The frames of ``span``, numbered from 0; their times stay those of the whole video.

    Raises:
      VideoError: when none is left, and of a stream.
    """
    if span == Span():
        return video
    names = video.frame_names
    return VideoSource(_Cut(video, span), names and names[span.start : span.stop : span.step])


class _Cut:
    """Frames of another video; see :class:`~.reader.VideoSource`."""

    seekable = True
    first = 0

    def __init__(self, video: VideoSource, span: Span):
        total = video.count()
        self._video = video
        self._numbers = range(total)[span.start : span.stop : span.step]
        if not self._numbers:
            raise no_such_frame(video.name, span.start, total)
        self.name, self.size = video.name, video.size
        self.rate, self.time_base = video.rate / span.step, video.time_base
        self.length = len(self._numbers)

    @property
    def problems(self) -> dict[int, str]:
        """Those of the whole video."""
        return dict(enumerate(self._video.problems))

    def count(self) -> int:
        """The number of frames."""
        return self.length

    def frames(self, start: int) -> Generator[Frame, None, None]:
        """Frames from ``start`` on."""
        if start >= self.length:
            raise VideoError(f"{self.name}: there is no frame {start} among {self.length} chosen")
        chosen = self._numbers[start:]
        with contextlib.closing(self._video.frames(chosen[0], chosen[-1] + 1)) as frames:
            for frame in frames:
                if frame.index in chosen:
                    yield frame._replace(index=self._numbers.index(frame.index))

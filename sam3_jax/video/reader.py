"""One type for every video: files, folders of pictures, arrays, iterators.

    with contextlib.closing(prefetch(iter(open_video("clip.mp4")))) as frames:
        for frame in frames: ...

Files are decoded by PyAV (``file.py``), the rest is in ``pictures.py``. Nothing keeps more than a
few frames in memory, whatever the length.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from sam3_jax.data.images import ImageSource, printable
from sam3_jax.video.file import VideoFile
from sam3_jax.video.frames import DEFAULT_RATE, Frame, FrameSource, VideoError, no_such_frame
from sam3_jax.video.pictures import Pictures, Stream, pictures_in

__all__ = ["Frame", "VideoError", "VideoInput", "VideoSource", "open_video"]

_AHEAD = 16  # frames that are read and passed over rather than to seek
# Held at a time when going backwards, where each time decoding starts at the key frame before.
_CHUNK = 32  # frames
_CHUNK_BYTES = 1 << 28  # 43 frames of 1080p, 10 of 4K


def open_video(source: VideoInput, *, fps: int | float | Fraction | None = None) -> VideoSource:
    """Opens a video.

    Args:
      source: a video file; a folder of pictures, taken in natural order; a (frames, height, width,
        3) uint8 array; a list of pictures (paths, PIL images, arrays); any iterator of pictures,
        which may be endless, and in which None is a frame that was lost; a video that was opened
        before, as it is.
      fps: frames a second of sources other than files, which state theirs; 25 by default.

    Raises:
      VideoError: no such file, no video in it, no frame that can be decoded.
    """
    if fps is not None and not 0 < fps <= 1000:
        raise VideoError(f"fps must be above 0 and at most 1000, got {fps}")
    if isinstance(source, VideoSource):
        return source
    rate = DEFAULT_RATE if fps is None else Fraction(fps).limit_denominator(1001)
    if isinstance(source, str | os.PathLike):
        path = Path(os.fsdecode(source))
        if path.is_dir():
            pictures = pictures_in(path)
            names = tuple(picture.name for picture in pictures)
            return VideoSource(Pictures(pictures, printable(str(path)), rate), names)
        return VideoSource(VideoFile(path))
    if isinstance(source, np.ndarray):
        return VideoSource(Pictures(source, "the array", rate))
    if isinstance(source, Sequence):
        return VideoSource(Pictures(source, "the list of pictures", rate))
    if isinstance(source, Iterable):
        return VideoSource(Stream(source, rate))
    raise VideoError(
        "a video must be a path, a (frames, height, width, 3) uint8 array, a list or an iterator "
        f"of pictures, got {type(source).__name__}"
    )


class VideoSource:
    """Frames of a video, in order or by number; made by :func:`open_video`.

    Attributes:
      name: for messages, the path as it was given.
      size: (height, width) of every frame, upright.
      rate: frames a second on average.
      time_base: seconds of one unit of ``Frame.pts``.
      seekable: whether frames can be had by number, and again.
      frame_names: of a folder's pictures, else None.
    """

    def __init__(self, frames: FrameSource, frame_names: tuple[str, ...] | None = None):
        self._frames = frames
        self.name, self.size = frames.name, frames.size
        self.rate, self.time_base = frames.rate, frames.time_base
        self.seekable = frames.seekable
        self.frame_names = frame_names
        self._cursor: Generator[Frame, None, None] | None = None
        self._next = 0  # the number of the frame that the cursor gives next

    @property
    def length(self) -> int | None:
        """Number of frames: what a file states until it has been counted, None where unknown."""
        return self._frames.length

    @property
    def problems(self) -> tuple[str, ...]:
        """What was wrong so far with the video as a whole, for a warning; frames have their own."""
        return tuple(self._frames.problems.values())

    def count(self) -> int:
        """The exact number of frames. Of a file the first call reads all of it, not decoding.

        Raises:
          VideoError: of a stream.
        """
        return self._frames.count()

    def __iter__(self) -> Generator[Frame, None, None]:
        """Every frame from the first on; of a stream those that nobody has taken yet."""
        return self.frames(self._frames.first)

    def frames(self, start: int = 0, stop: int | None = None) -> Generator[Frame, None, None]:
        """Frames ``start`` up to, but without, ``stop`` (None: to the end).

        Several may run at the same time, in several threads; not so of a stream.

        Raises:
          VideoError: when frame ``start`` does not exist, or is gone.
        """
        if start < 0 or (self.seekable and start and start >= self.count()):
            raise no_such_frame(self.name, start, self.count() if self.seekable else None)
        with contextlib.closing(self._frames.frames(start)) as frames:
            while stop is None or start < stop:  # asked first: a stream's frame would be lost
                frame = next(frames, None)
                if frame is None:
                    return
                yield frame
                start = frame.index + 1

    def number_from(self, index: int) -> None:
        """The next frame of a stream, of which none was taken yet, gets number ``index``."""
        self._frames.first = index

    def seek(self, index: int) -> Frame:
        """Frame ``index``, exactly. One after the other is as fast as iterating.

        To be called from one thread at a time.

        Raises:
          VideoError: when it does not exist, or is gone.
        """
        if self._cursor is None or not self._next <= index <= self._next + _AHEAD:
            self.close()
            self._cursor = self.frames(index)
        for frame in self._cursor:
            self._next = frame.index + 1
            if frame.index == index:
                return frame
        self.close()
        raise no_such_frame(self.name, index, self._frames.length or self._next)

    def backwards(self, start: int | None = None) -> Generator[Frame, None, None]:
        """Frames ``start`` (None: the last one) down to 0, a few held at a time.

        Raises:
          VideoError: of a stream, and when frame ``start`` does not exist.
        """
        length = self.count()
        end = length if start is None else start + 1
        if not 0 < end <= length:
            raise no_such_frame(self.name, end - 1, length)
        chunk_size = max(min(_CHUNK, _CHUNK_BYTES // (3 * self.size[0] * self.size[1])), 1)
        while end > 0:
            first = max(end - chunk_size, 0)
            chunk = list(self.frames(first, end))
            while chunk:
                yield chunk.pop()
            end = first

    def close(self) -> None:
        """Closes what :meth:`seek` keeps open; the source can be used again."""
        if self._cursor is not None:
            self._cursor.close()
        self._cursor, self._next = None, 0


VideoInput = (
    str
    | os.PathLike
    | np.ndarray
    | Sequence[ImageSource]
    | Iterable[ImageSource | None]
    | VideoSource
)

"""Videos that are no video files: folders and lists of pictures, arrays, endless iterators."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from sam3_jax.data.images import ImageError, ImageSource, load_image, printable
from sam3_jax.inference.files import OUTPUT_SUFFIXES, SUFFIXES
from sam3_jax.video.frames import Frame, VideoError, no_such_frame


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorts ``frame2`` before ``frame10``: runs of digits by their value, the rest as text."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    key = [(0, int(p), "") if p.isdecimal() else (1, 0, p.casefold()) for p in parts]
    return [*key, (2, 0, name)]  # 01 and 1 are different names: some order, always the same


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder in natural order, neither hidden ones nor overlays of ours.

    Raises:
      VideoError: without any, or when the folder cannot be read.
    """
    name = printable(str(folder))
    try:
        inside = list(folder.iterdir())
    except OSError as error:
        raise VideoError(f"{name}: cannot look into the folder ({error.strerror})") from error
    found = [p for p in inside if p.suffix.lower() in SUFFIXES]
    found = [p for p in found if p.name[0] != "." and not p.name.endswith(OUTPUT_SUFFIXES)]
    if not found:
        kinds = " ".join(sorted(SUFFIXES))
        raise VideoError(f"{name}: no pictures in the folder (looked for {kinds})")
    return sorted(found, key=lambda path: natural_key(path.name))


class Pictures:
    """Frames that can each be had by number: a folder, a list of pictures, an array.

    Args:
      pictures: paths, PIL images or (h, w, 3) uint8 arrays; an array of shape (frames, h, w, 3).
      name: for messages.
      rate: frames a second.

    Raises:
      VideoError: without a single readable picture.
    """

    seekable = True
    first = 0

    def __init__(self, pictures: Sequence[ImageSource] | np.ndarray, name: str, rate: Fraction):
        if isinstance(pictures, np.ndarray) and pictures.ndim != 4:
            raise VideoError(
                f"a video array must be (frames, height, width, 3) uint8, got {pictures.shape}"
            )
        self._pictures = pictures
        self.name, self.rate, self.time_base = name, rate, 1 / rate
        self.length = len(pictures)
        self.problems: dict[str, str] = {}
        self.size = self._first_size()

    def _first_size(self) -> tuple[int, int]:
        reason = "it is empty: give at least one picture"
        for picture in self._pictures:
            try:
                return load_image(picture).shape[:2]
            except ImageError as error:
                reason = str(error)
        raise VideoError(f"{self.name}: the video has no readable frame ({reason})")

    def frames(self, start: int) -> Generator[Frame, None, None]:
        """Frames from ``start`` on; a picture that cannot be read is a missing frame.

        Raises:
          VideoError: on a picture of another size.
        """
        for index in range(start, self.length):
            yield _frame(index, self._pictures[index], self)

    def count(self) -> int:
        """The number of frames."""
        return self.length


class Stream:
    """Frames as an iterator gives them, once and perhaps for ever: a camera.

    Args:
      pictures: gives (h, w, 3) uint8 arrays, PIL images or paths; None is a frame that was lost.
      rate: frames a second.

    Raises:
      VideoError: when it ends without a readable picture.
    """

    name = "the stream"
    seekable = False

    def __init__(self, pictures: Iterable[ImageSource | None], rate: Fraction):
        self.rate, self.time_base = rate, 1 / rate
        self.length: int | None = None
        self.problems: dict[str, str] = {}
        self._rest = iter(pictures)
        self._taken: list[ImageSource | None] = []  # until the first picture, for its size
        self.first = 0
        self.size = self._first_size()

    def _first_size(self) -> tuple[int, int]:
        for picture in self._rest:
            self._taken.append(picture)
            if picture is not None:
                try:
                    return load_image(picture).shape[:2]
                except ImageError as error:
                    if not isinstance(picture, str | Path):
                        raise VideoError(f"frame {len(self._taken) - 1}: {error}") from error
        raise VideoError(f"{self.name} ended without a readable frame; does its source run?")

    def frames(self, start: int) -> Generator[Frame, None, None]:
        """The frames that nobody has taken yet, from ``start`` on.

        Raises:
          VideoError: when frame ``start`` is gone, and on a picture of another size.
        """
        if start < self.first:
            raise VideoError(
                f"frame {start} of {self.name} is gone, the next one is {self.first}: a stream can "
                "be read once; record it to a file to go back"
            )
        while self._taken or (picture := next(self._rest, self)) is not self:
            if self._taken:
                picture = self._taken.pop(0)
            self.first += 1
            if self.first > start:
                yield _frame(self.first - 1, picture, self)
        self.length = self.first
        if start > self.first:
            raise no_such_frame(self.name, start, self.first)

    def count(self) -> int:
        """Not to be had before the end."""
        raise VideoError(f"{self.name}: the number of frames of a stream is not known")


def _frame(index: int, picture: ImageSource | None, source: Pictures | Stream) -> Frame:
    when = index, index, float(index * source.time_base)
    if picture is None:
        return Frame(*when, None, "the stream delivered no picture")
    try:
        image: UInt8[np.ndarray, "h w 3"] = load_image(picture)
    except ImageError as error:
        if isinstance(picture, str | Path):
            return Frame(*when, None, str(error))
        raise VideoError(f"{source.name}, frame {index}: {error}") from error  # a programmer's
    if image.shape[:2] != source.size:
        named = f" ({printable(str(picture))})" if isinstance(picture, str | Path) else ""
        raise VideoError(
            f"{source.name}: frame {index}{named} has {image.shape[1]} x {image.shape[0]} pixels, "
            f"the first one {source.size[1]} x {source.size[0]}: a video's frames have one size, "
            "resize it or take it out"
        )
    return Frame(*when, image)

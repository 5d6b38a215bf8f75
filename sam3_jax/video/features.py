"""What the backbone makes of frames: ahead in batches for tracking, and again for prompts.

Of a video that can be read again nothing is kept but the tracker's pyramids of the latest prompted
frames. Of a stream a frame that was prompted before it was tracked is held until tracking takes it.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from sam3_jax.data.resize import resize_image
from sam3_jax.inference.engine import Engine
from sam3_jax.types import Levels
from sam3_jax.video.frames import Frame, VideoError, no_such_frame
from sam3_jax.video.prefetch import prefetch
from sam3_jax.video.reader import VideoSource

T = TypeVar("T")
KEPT = 8  # pyramids of prompted frames: 22 MB each at the released size in float32


class Encoded(NamedTuple):
    """A frame without its picture; ``trunk`` is None where the picture is missing."""

    index: int
    time: float
    error: str | None
    trunk: Float[Array, "1 h w c"] | None


def _take(
    trunk: Float[Array, "b h w c"], index: Int[Array | np.ndarray, ""]
) -> Float[Array, "1 h w c"]:
    return lax.dynamic_slice_in_dim(trunk, index, 1)


@functools.cache
def _taker(where: NamedSharding | None) -> Callable:
    """:func:`_take` with its result on these devices; one program for all sessions."""
    return jax.jit(_take, out_shardings=where)


class Features:
    """Features of one video's frames."""

    def __init__(self, engine: Engine, video: VideoSource, ahead: int):
        """``ahead``: frames that are encoded together."""
        self.video = video
        self._engine = engine
        self._batch = ahead if video.seekable else 1
        self._held: Encoded | None = None  # of a stream: read, but not tracked
        self._next = 0  # of a stream: the first frame that was not read
        self._kept: collections.OrderedDict[int, Levels] = collections.OrderedDict()
        # On a mesh a frame is encoded by one device and needed by all.
        self._whole = None if engine.mesh is None else NamedSharding(engine.mesh, PartitionSpec())
        self._take = _taker(self._whole)

    @functools.cached_property
    def total(self) -> int | None:
        """Frames of the video, None for a stream."""
        return self.video.count() if self.video.seekable else None

    def check(self, index: int) -> None:
        """Raises a VideoError unless the frame exists and can be had.

        Of a stream these are the next frame and the last ones, whose features are still there.
        """
        if index < 0 or (self.total is not None and index >= self.total):
            raise no_such_frame(self.video.name, index, self.total)
        if self.total is None and index not in (*self._kept, self._next):
            when = "is gone" if index < self._next else "has not come yet"
            last = f"{self._next - 1} or " if self._next else ""
            raise VideoError(
                f"frame {index} of {self.video.name} {when}: prompt frame {last}{self._next}, or "
                "record the stream to a file"
            )

    def go_on(self, index: int) -> None:
        """The next frame of a stream that nothing was read of is number ``index``."""
        self.video.number_from(index)
        self._next = index

    def frames(
        self, start: int, stop: int | None, *, backward: bool = False
    ) -> Generator[Encoded, None, None]:
        """Frames from ``start`` up to, but without, ``stop``, encoded in batches."""
        if not self.video.seekable:
            yield from self._stream(start, stop)
            return
        if backward:
            least = -1 if stop is None else stop
            source = itertools.takewhile(
                lambda frame: frame.index > least, self.video.backwards(start)
            )
        else:
            source = self.video.frames(start, stop)
        with contextlib.closing(prefetch(map(self._small, source), 2 * self._batch)) as frames:
            while batch := list(itertools.islice(frames, self._batch)):
                yield from self._encode(batch)

    def tracker(self, index: int, trunk: Array | None = None) -> Levels:
        """The tracker's pyramid of a frame that is tracked or prompted.

        Raises:
          VideoError: when the frame does not exist, is gone or cannot be read.
        """
        if index not in self._kept:
            if trunk is None:
                trunk = self._read(index)
            levels = self._engine.run.tracker_levels(self._engine.params, trunk)
            self._kept[index] = self._everywhere(levels)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return self._kept[index]

    def passed(self, index: int, *, keep: bool) -> None:
        """Tracking is done with a frame; only prompted ones and a stream's last are kept."""
        if self.video.seekable:
            if not keep:
                self._kept.pop(index, None)
        else:
            for other in [i for i in self._kept if i < index]:
                del self._kept[other]

    def _read(self, index: int) -> Array:
        self.check(index)
        if self.video.seekable:
            (encoded,) = self._encode([self._small(self.video.seek(index))])
        else:
            self._held = encoded = next(self._fresh(index, index + 1))
        if encoded.trunk is None:
            raise VideoError(
                f"{self.video.name}: frame {index} cannot be prompted, it could not be read "
                f"({encoded.error}); prompt another one"
            )
        return encoded.trunk

    def _stream(self, start: int, stop: int | None) -> Iterator[Encoded]:
        held, self._held = self._held, None
        if held is not None and held.index >= start:
            yield held
            start = held.index + 1
        yield from self._fresh(start, stop)

    def _fresh(self, start: int, stop: int | None) -> Iterator[Encoded]:
        with contextlib.closing(self.video.frames(start, stop)) as frames:
            for frame in frames:
                self._next = frame.index + 1
                yield from self._encode([self._small(frame)])

    def _small(self, frame: Frame) -> Frame:
        """The frame at the model's size; runs in the thread that reads."""
        if frame.image is None:
            return frame
        side = self._engine.config.image_size
        return frame._replace(image=resize_image(frame.image, (side, side)))

    def _everywhere(self, arrays: T) -> T:
        return arrays if self._whole is None else jax.device_put(arrays, self._whole)

    def _encode(self, batch: list[Frame]) -> Iterator[Encoded]:
        size = 1 if len(batch) == 1 and self._batch == 1 else self._batch
        images = [frame.image for frame in batch if frame.image is not None]
        trunk = None
        if images:
            trunk = self._engine.trunk(np.stack([*images, *images[:1] * (size - len(images))]))
        place = 0
        for frame in batch:
            own = None
            if frame.image is not None:
                if size > 1:
                    own = self._take(trunk, np.asarray(place, np.int32))
                else:
                    own = self._everywhere(trunk)
                place += 1
            yield Encoded(frame.index, frame.time, frame.error, own)

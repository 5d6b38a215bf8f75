"""Writing a video: H.264 in MP4 that any browser plays, at the times of its source."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from jaxtyping import UInt8

from sam3_jax.inference.files import replacing
from sam3_jax.video.container import reason_of
from sam3_jax.video.frames import DEFAULT_RATE, VideoError

CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
# The best first; the last one is part of every ffmpeg.
ENCODERS = ("libx264", "libopenh264", "mpeg4")
_X264 = {"crf": "20", "preset": "veryfast"}  # hardly to be told from the source, quick
_BITS = 0.2  # for each pixel, where an encoder wants to be told
_MPEG4_UNIT = Fraction(1, 60000)  # of time; the format has no unit below 1 / 65535 seconds
_BT709 = 1  # as ffmpeg counts them; what players take HD video for
_LIMITED = 1


def find_encoder(names: tuple[str, ...] = ENCODERS) -> str:
    """The first of some encoders that this ffmpeg has.

    Raises:
      VideoError: when it has none.
    """
    for name in names:
        with contextlib.suppress(av.FFmpegError, ValueError):
            av.Codec(name, "w")
            return name
    raise VideoError(
        f"ffmpeg has none of the encoders {', '.join(names)}; install PyAV from PyPI (pip install "
        "av), which brings them"
    )


@contextlib.contextmanager
def open_writer(
    path: Path,
    size: tuple[int, int],
    *,
    rate: Fraction = DEFAULT_RATE,
    time_base: Fraction | None = None,
    encoder: str | None = None,
) -> Iterator[VideoWriter]:
    """A context in which a video is written; at its end the file is there, whole.

    An exception inside leaves no file, and an older one as it was.

    Args:
      path: ``.mp4``, ``.m4v``, ``.mov`` or ``.mkv``.
      size: (height, width) of the frames. Odd sizes get another row or column like the last one,
        because the format has colour for 2 x 2 pixels only.
      rate: frames a second, on average where they come at uneven times.
      time_base: seconds of one unit of time; None: of one frame.
      encoder: None: the first of ``ENCODERS`` that there is.

    Raises:
      VideoError: on another suffix, without an encoder, and when no frame was written.
      OSError: with the file's name, when it cannot be written.
    """
    kind = CONTAINERS.get(path.suffix.lower())
    if kind is None:
        raise VideoError(f"{path}: name a video file to write {' '.join(CONTAINERS)}")
    name = find_encoder(ENCODERS if encoder is None else (encoder,))
    # The index at the front, so that a browser can play it while it loads.
    options = {} if kind == "matroska" else {"movflags": "+faststart"}
    with replacing(path) as temporary, _as_os_error():
        # The name is ours, not a protocol's: an absolute path.
        target = str(temporary.absolute())
        with av.open(target, "w", format=kind, container_options=options) as container:
            unit = 1 / rate if time_base is None else time_base
            writer = VideoWriter(path, container, name, size, rate, unit)
            yield writer
            writer.finish()


class VideoWriter:
    """Takes the frames of one video; made by :func:`open_writer`."""

    def __init__(
        self,
        path: Path,
        container: OutputContainer,
        encoder: str,
        size: tuple[int, int],
        rate: Fraction,
        time_base: Fraction,
    ):
        self.encoder = encoder
        self._path, self._container, self._size = path, container, size
        self._base = self._unit = time_base
        if encoder == "mpeg4" and time_base.denominator > 1 / _MPEG4_UNIT:
            self._unit = _MPEG4_UNIT
        self._step = max(round(1 / (rate * self._unit)), 1)
        self._last: int | None = None
        self._stream = self._add_stream(rate)

    def _add_stream(self, rate: Fraction) -> VideoStream:
        x264 = self.encoder == "libx264"
        stream = self._container.add_stream(
            self.encoder, rate=rate.limit_denominator(1001), options=_X264 if x264 else {}
        )
        height, width = (side + side % 2 for side in self._size)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        context = stream.codec_context
        if not x264:
            context.bit_rate = int(_BITS * height * width * rate)
        context.colorspace, context.color_range = _BT709, _LIMITED
        context.time_base = self._unit
        return stream

    def write(self, image: UInt8[np.ndarray, "h w 3"], pts: int | None = None) -> None:
        """Appends a frame.

        Args:
          image: RGB.
          pts: when it is shown, in units of the time base; None: one frame after the one before.
            A time that is not after the frame before is moved there.

        Raises:
          ValueError: on a frame of another size.
          OSError: with the file's name, for example on a full disk.
        """
        if image.shape != (*self._size, 3) or image.dtype != np.uint8:
            raise ValueError(
                f"{self._path}: a frame must have shape {(*self._size, 3)} and dtype uint8, got "
                f"{image.shape} and {image.dtype}"
            )
        height, width = self._size
        image = np.pad(image, [(0, height % 2), (0, width % 2), (0, 0)], mode="edge")
        frame = VideoFrame.from_ndarray(image, format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED)
        frame.pts, frame.time_base = self._when(pts), self._unit
        with _as_os_error():
            self._container.mux(self._stream.encode(frame))

    def _when(self, pts: int | None) -> int:
        first = self._last is None
        if pts is None:
            now = 0 if first else self._last + self._step
        else:
            now = round(pts * self._base / self._unit)
        self._last = now if first else max(now, self._last + 1)
        return self._last

    def finish(self) -> None:
        """Writes what the encoder still holds.

        Raises:
          VideoError: when no frame was written.
        """
        if self._last is None:
            raise VideoError(f"{self._path}: no frame was written, so there is no video")
        self._container.mux(self._stream.encode(None))


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """What ffmpeg cannot write, as an OSError."""
    try:
        yield
    except av.FFmpegError as error:
        number = error.errno if isinstance(error, OSError) else errno.EIO
        raise OSError(number, reason_of(error)) from error

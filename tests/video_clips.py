"""Small clips for tests: every frame shows its number, so that it can be read back from pixels."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SIZE = (48, 96)  # (height, width)
BITS = 6
UNIT = Fraction(1, 12800)  # of time; a frame takes 512 at 25 frames a second


def has_encoder(name: str) -> bool:
    with contextlib.suppress(av.FFmpegError, ValueError):
        av.Codec(name, "w")
        return True
    return False


def numbered(index: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A picture whose upper half shows ``index`` in binary, the lower half a moving block."""
    height, width = size
    image = np.full((height, width, 3), (90, 110, 70), np.uint8)
    block = width // BITS
    for bit in range(BITS):
        on = index >> bit & 1
        image[: height // 2, bit * block : (bit + 1) * block] = 230 if on else 20
    x = index * 3 % (width - 10)
    image[height // 2 + 4 : height - 4, x : x + 10] = (210, 60, 40)
    return image


def number_in(image: np.ndarray) -> int:
    """The number that a picture shows."""
    height, width = image.shape[:2]
    block = width // BITS
    middle = image[height // 4, block // 2 :: block][:BITS].mean(1) > 125
    return int(sum(1 << bit for bit in range(BITS) if middle[bit]))


def write_clip(
    path: Path,
    frames: int = 30,
    *,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    pts: Sequence[int] | None = None,
    unit: Fraction = UNIT,
    size: tuple[int, int] = SIZE,
    gop: int = 10,
    pixels: str = "yuv420p",
    display: tuple[float, bool, bool] | None = None,
    container: dict[str, str] | None = None,
) -> Path:
    """Encodes numbered pictures; ``display`` is (degrees counter-clockwise, mirror x, mirror y)."""
    with av.open(str(path), "w", container_options=container or {}) as out:
        stream = out.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = size
        stream.pix_fmt = pixels
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = unit
        if display is not None:
            stream.set_display_rotation(*display)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered(i, size), format="rgb24")
            frame.time_base = unit
            frame.pts = pts[i] if pts is not None else int(i / (25 * unit))
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def spoil(path: Path, packets: Sequence[int]) -> list[int]:
    """Overwrites the data of packets, by their place in the file; the frames that they were.

    For files whose packets keep nothing else in their bytes, such as MP4.
    """
    with av.open(str(path)) as container:
        found = [p for p in container.demux(container.streams.video[0]) if p.size]
    order = sorted(p.pts for p in found)
    data = bytearray(path.read_bytes())
    for place in packets:
        packet = found[place]
        data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    path.write_bytes(data)
    return sorted(order.index(found[place].pts) for place in packets)


def write_two_sizes(path: Path, sizes: Sequence[tuple[int, int]], frames: int = 6) -> Path:
    """A Matroska file whose pictures change their size, each ``frames`` long."""
    elementary = path.with_suffix(".h264")
    parts = []
    for size in sizes:
        write_clip(elementary, frames, options={"bf": "0"}, size=size)
        parts.append(elementary.read_bytes())
    elementary.write_bytes(b"".join(parts))
    with av.open(str(elementary)) as source, av.open(str(path), "w") as out:
        old = source.streams.video[0]
        new = out.add_stream_from_template(old)
        for i, packet in enumerate(p for p in source.demux(old) if p.size):
            packet.pts = packet.dts = int(i / (25 * old.time_base))
            packet.stream = new
            out.mux(packet)
    return path

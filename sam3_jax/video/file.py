"""Frames of a video file, decoded by PyAV.

A frame's number is its place in the order of display. It is counted by packets, not by pictures:
where a packet gives no picture, because it is damaged, its frame is missing but keeps its number,
so that numbers do not depend on where decoding began.

Decoding uses threads within a picture (slices) and none across pictures: with those, a damaged
packet near the end takes undamaged frames after it with it (5 of 40 lost instead of 2), and one
core decodes 1080p H.264 at about 150 frames a second.
"""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_left
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from jaxtyping import UInt8

from sam3_jax.data.images import printable
from sam3_jax.video.container import opened, reason_of
from sam3_jax.video.frames import DEFAULT_RATE, Frame, VideoError, no_such_frame
from sam3_jax.video.packets import Clock, PacketTable, is_frame, read_table
from sam3_jax.video.rotation import turn_of, upright

_FASTEST = 1000  # frames a second; what states more is not to be believed
_NO_PICTURE = "the decoder gave no picture, its data may be damaged"


class _Picture(NamedTuple):
    """What came of one frame's packet; ``pts`` is None where the file has no timestamps."""

    pts: int | None
    frame: VideoFrame | None
    error: str | None


class VideoFile:
    """A video file; for the attributes see :class:`reader.VideoSource`.

    Raises:
      VideoError: missing, no video, or without a frame that can be decoded.
    """

    first = 0
    seekable = True

    def __init__(self, path: Path):
        self._path, self.name = path, printable(str(path))
        self.problems: dict[str, str] = {}
        self._table: PacketTable | None = None
        self._begin: int | None = None  # the first frame's timestamp
        with opened(self._path, self.name) as (container, stream):
            rates = (stream.average_rate, stream.guessed_rate)
            self.rate = next((r for r in rates if r and 0 < r <= _FASTEST), DEFAULT_RATE)
            self.time_base = stream.time_base
            self.length: int | None = stream.frames or None
            sample = self._probe(container, stream)
        self._stored, self._turn = (sample.height, sample.width), turn_of(sample)
        self.size = self._stored[::-1] if self._turn.transpose else self._stored

    def _probe(self, container: InputContainer, stream: VideoStream) -> VideoFrame:
        """The first picture that can be decoded; also finds out when the first frame is shown."""
        failed, reason = 0, "it has no frames"
        for picture in self._pictures(container.demux(stream), stream):
            if failed == 0:
                self._begin = picture.pts
                if picture.pts is None:
                    self.time_base = 1 / self.rate
            if picture.frame is not None:
                return picture.frame
            failed, reason = failed + 1, picture.error
        detail = f"all {failed} are damaged: {reason}" if failed else reason
        raise VideoError(
            f"{self.name}: no frame can be decoded ({detail}); copy the file again or re-encode it"
        )

    def frames(self, start: int) -> Generator[Frame, None, None]:
        """Frames from ``start`` on, decoded from the key frame before it where there is one.

        Raises:
          VideoError: when there is no frame ``start``.
        """
        index = -1
        for index, picture in self._numbered(start):
            if index >= start:
                yield self._frame(index, picture)
        self.length = index + 1
        if start > index:
            raise no_such_frame(self.name, start, self.length)

    def count(self) -> int:
        """The exact number of frames; the first call reads the file to the end."""
        return self._packet_table().count

    def _packet_table(self) -> PacketTable:
        if self._table is None:
            with opened(self._path, self.name) as (container, stream):
                clock = Clock()
                packets = self._readable(container.demux(stream), stream, clock)
                self._table = read_table(packets, clock)
            self.length = self._table.count
        return self._table

    def _numbered(self, start: int) -> Iterator[tuple[int, _Picture]]:
        """Pictures with their numbers, from one at or before ``start`` on."""
        if start:
            with opened(self._path, self.name) as (container, stream):
                found = self._seek(container, stream, start)
                if found is not None:
                    key, number, packets = found
                    # Pictures before the key frame may follow it and refer to what came earlier.
                    pictures = self._pictures(itertools.chain([key], packets), stream)
                    pictures = itertools.dropwhile(lambda p: p.pts < key.pts, pictures)
                    yield from enumerate(pictures, number)
                    return
        with opened(self._path, self.name) as (container, stream):
            yield from enumerate(self._pictures(container.demux(stream), stream))

    def _seek(
        self, container: InputContainer, stream: VideoStream, index: int
    ) -> tuple[Packet, int, Iterator[Packet]] | None:
        """A key frame's packet and number, at or before a frame, and the packets after it.

        None where it cannot be found.
        """
        table = self._packet_table()
        key = table.key_before(index) if index < table.count else None
        if key is None:
            return None
        try:
            container.seek(key, stream=stream)
            packets = container.demux(stream)
            first = next(packets)
        except (av.FFmpegError, StopIteration):
            return None
        # MPEG program streams, for one, are taken up in the middle, with other timestamps.
        if not first.is_keyframe or first.pts is None or first.pts > key:
            return None
        number = bisect_left(table.times, first.pts)
        return (first, number, packets) if table.times[number] == first.pts else None

    def _readable(
        self, packets: Iterator[Packet], stream: VideoStream, clock: Clock
    ) -> Iterator[Packet]:
        """Packets up to where the file can be read; what is missing at its end is recorded."""
        end, why = None, ""
        try:
            for packet in packets:
                clock.set(packet)
                if packet.pts is not None:
                    end = max(end or 0, packet.pts + (packet.duration or 0))
                yield packet
        except av.FFmpegError as error:
            why = f" ({reason_of(error)})"
        stated = _stated_duration(stream)
        if end is None or stated is None or self._begin is None:
            return
        seconds = float((end - self._begin) * stream.time_base)
        if seconds < stated - max(3 / self.rate, stated / 100):  # headers round
            self.problems["end"] = (
                f"{self.name}: can be read for {seconds:.2f} of {stated:.2f} seconds{why}; it may "
                "be cut off, copy it again to get the rest"
            )

    def _pictures(self, packets: Iterator[Packet], stream: VideoStream) -> Iterator[_Picture]:
        """What comes of packets, in the order of display; None for a frame that does not come.

        Pictures come in the order of their timestamps: when one has come, those of earlier packets
        that have not will not. Without timestamps an error stands for one frame.
        """
        waiting: list[int] = []  # a heap: timestamps of packets without a picture yet
        error = _NO_PICTURE
        for packet in itertools.chain(self._readable(packets, stream, Clock()), [None]):
            if packet is not None:
                if not packet.size:  # of a frame dropped when recording; to the decoder: the end
                    continue
                if packet.pts is not None and is_frame(packet):
                    heapq.heappush(waiting, packet.pts)
            try:
                decoded = stream.decode(packet)  # None: what the decoder still holds
            except av.FFmpegError as failure:
                decoded, error = [], reason_of(failure)
                if packet is not None and packet.pts is None:
                    yield _Picture(None, None, error)
            for frame in decoded:
                pts = frame.pts
                while waiting and pts is not None and waiting[0] < pts:
                    yield _Picture(heapq.heappop(waiting), None, error)
                if waiting and pts in (None, waiting[0]):
                    pts = heapq.heappop(waiting)
                damage = "damaged, in parts guessed by the decoder" if frame.is_corrupt else None
                yield _Picture(pts, frame, damage)
        for pts in sorted(waiting):
            yield _Picture(pts, None, error)

    def _frame(self, index: int, picture: _Picture) -> Frame:
        pts = index if self._begin is None or picture.pts is None else picture.pts - self._begin
        image, error = None, picture.error
        if picture.frame is not None:
            try:
                image = self._image(picture.frame, index)
            except (av.FFmpegError, ValueError) as failure:
                error = reason_of(failure)
        if error is not None:
            error = f"{self.name}, frame {index}: {error}"
        return Frame(index, pts, float(pts * self.time_base), image, error)

    def _image(self, frame: VideoFrame, index: int) -> UInt8[np.ndarray, "h w 3"]:
        height, width = self._stored
        if (frame.height, frame.width) != self._stored:
            self.problems.setdefault(
                "size",
                f"{self.name}: from frame {index} on the size is {frame.width} x {frame.height} "
                f"and not {width} x {height}; frames are resized to the first one's",
            )
        pixels = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
        return upright(pixels, self._turn)


def _stated_duration(stream: VideoStream) -> float | None:
    """Seconds that the file says it lasts."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    try:  # Matroska and WebM: "00:01:30.250000000"
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except (KeyError, ValueError):
        return None

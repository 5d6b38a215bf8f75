"""Where a file's frames are: timestamps and key frames, read from its packets without decoding."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

from av.packet import Packet

_SHOWN_VP8 = 0x10  # in a VP8 packet's first byte: a frame to be shown, not one to refer to only


def is_frame(packet: Packet) -> bool:
    """Whether a picture is to come of a packet."""
    if not packet.size or packet.is_discard:  # a frame dropped when recording; cut off by an edit
        return False
    if packet.stream.codec_context.name == "vp8":
        return bool(bytes(packet)[0] & _SHOWN_VP8)
    return True


class Clock:
    """Lets timestamps that begin anew, as in recordings strung together, go on instead."""

    def __init__(self):
        self.restarts = 0
        self._offset = 0
        self._last: int | None = None  # the decoding time of the packet before

    def set(self, packet: Packet) -> None:
        """Changes a packet's timestamps; to be called with all of a stream's in their order."""
        if packet.dts is None:
            return
        if self._last is not None and packet.dts + self._offset < self._last:
            self._offset = self._last + (packet.duration or 1) - packet.dts
            self.restarts += 1
        if self._offset:
            packet.dts += self._offset
            if packet.pts is not None:
                packet.pts += self._offset
        self._last = packet.dts


class PacketTable(NamedTuple):
    """Timestamps of all frames in the order of display, 8 bytes each: 2.6 MB for three hours.

    ``times`` and ``keys`` are empty where timestamps are missing, begin anew or are not unique:
    then frames cannot be told apart by them, and seeking has to decode from the beginning.
    """

    count: int
    times: array[int]
    keys: array[int]  # those of key frames

    def key_before(self, index: int) -> int | None:
        """The timestamp of the last key frame shown at or before frame ``index``."""
        place = bisect_right(self.keys, self.times[index]) if self.times else 0
        return self.keys[place - 1] if place else None


def read_table(packets: Iterator[Packet], clock: Clock) -> PacketTable:
    """The table of a stream's packets, which ``clock`` has set."""
    count, times, keys = 0, array("q"), array("q")
    for packet in packets:
        if not is_frame(packet):
            continue
        count += 1
        if packet.pts is not None:
            times.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
    times, keys = array("q", sorted(times)), array("q", sorted(keys))
    unique = all(a < b for a, b in zip(times, times[1:], strict=False))
    if len(times) < count or not unique or clock.restarts:
        times, keys = array("q"), array("q")
    return PacketTable(count, times, keys)

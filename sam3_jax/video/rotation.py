"""Rotation that a file states: phones store pictures lying on their side, and how to turn them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from av.video.frame import VideoFrame
from jaxtyping import UInt8


class Turn(NamedTuple):
    """A turn by a multiple of 90 degrees, perhaps mirrored: transpose first, then flip."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False


def turn_of(frame: VideoFrame) -> Turn:
    """How a decoded frame is to be shown, of its display matrix; other angles are rounded.

    The matrix maps pixels (x, y), y downwards, to (a x + c y, b x + d y).
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return Turn()
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), np.int32).tolist()
    if abs(b) > abs(a):
        return Turn(True, c < 0, b < 0)
    return Turn(False, a < 0, d < 0)


def upright(image: UInt8[np.ndarray, "h w 3"], turn: Turn) -> UInt8[np.ndarray, "_ _ 3"]:
    """The picture as it is to be seen."""
    if turn.transpose:
        image = image.swapaxes(0, 1)
    if turn.flip_x:
        image = image[:, ::-1]
    if turn.flip_y:
        image = image[::-1]
    return np.ascontiguousarray(image)

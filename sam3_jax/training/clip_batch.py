"""What a step of the tracker's training takes: clips with the masks of a few objects."""

from __future__ import annotations

from typing import NamedTuple

import jax
from einops import rearrange
from jaxtyping import Array, Bool, UInt8


class ClipBatch(NamedTuple):
    """B clips of T frames with M objects each.

    ``frames`` are 8-bit RGB. ``masks`` have the size at which they are compared; an empty one says
    that its object is not in the frame, unless ``known`` is False: then nobody has looked. Valid
    objects (no padding) are seen in the first frame.
    """

    frames: UInt8[Array, "b t h w 3"]
    masks: Bool[Array, "b m t s s"]
    known: Bool[Array, "b m t"]
    valid: Bool[Array, "b m"]


def cut_clips(batch: ClipBatch, count: int) -> ClipBatch:
    """The batch with a new leading axis of ``count``; every ``count``-th clip goes into one.

    So each device cuts its own clips, and none moves between devices.

    Raises:
      ValueError: where ``count`` does not divide the number of clips.
    """
    if len(batch.frames) % count:
        raise ValueError(f"{len(batch.frames)} clips cannot be cut into {count} micro-batches")
    return jax.tree.map(lambda x: rearrange(x, "(b m) ... -> m b ...", m=count), batch)

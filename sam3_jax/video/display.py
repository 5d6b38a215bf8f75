"""From low-resolution logits to what a caller sees of a frame."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt8

from sam3_jax.tracking.concepts.outputs import FrameOutput, resolve
from sam3_jax.tracking.masks import resize
from sam3_jax.video.concept_programs import padded
from sam3_jax.video.objects import Objects

OWN = -2  # of objects that may overlap all others: -2, -3, .. instead of a phrase


class VideoFrame(NamedTuple):
    """The objects of one frame, in the order of their identities.

    ``error`` says why the picture is missing or damaged; a missing one has no objects.
    ``phrases`` is "" for an object that a user clicked. ``scores`` are those of the detections
    that objects came of, 1 after a click; ``tracker_scores`` are this frame's.
    """

    index: int
    ids: Int[np.ndarray, " n"]
    masks: Bool[np.ndarray, "n h w"]  # at the video's size
    boxes: Float[np.ndarray, "n 4"]  # (x0, y0, x1, y1), pixel edges of the masks
    scores: Float[np.ndarray, " n"]
    phrases: tuple[str, ...]
    tracker_scores: Float[np.ndarray, " n"]
    time: float = 0.0
    error: str | None = None

    @property
    def objects(self) -> Objects:
        """What overlays and result files take."""
        return Objects(
            self.ids, self.masks, self.boxes, self.scores, self.phrases, self.tracker_scores
        )


class Seen(NamedTuple):
    """A frame that was tracked, waiting to be shown."""

    output: FrameOutput
    logits: Float[Array, "n h w"] | None  # in the order of the output, padded; None: no picture
    time: float
    error: str | None
    overlapping: bool = False  # objects may overlap, as clicked ones do on their own


def empty_output(index: int) -> FrameOutput:
    """That of a frame without any object."""
    ints, floats = np.zeros(0, np.int32), np.zeros(0, np.float32)
    none = np.zeros(0, bool)
    number = np.asarray(index)
    return FrameOutput(number, ints, ints, floats, floats, ints, ints, none, ints, ints)


@functools.partial(jax.jit, static_argnames=("size", "exclusive"))
def _show(
    logits: Float[Array, "n h w"],
    scores: Float[Array, " n"],
    phrases: Int[Array, " n"],
    ids: Int[Array, " n"],
    shown: Bool[Array, " n"],
    *,
    size: tuple[int, int],
    exclusive: bool,
) -> tuple[UInt8[Array, "n bytes"], Float[Array, "n 4"], Bool[Array, " n"]]:
    """Masks at the video's size as bits: an eighth to move."""

    def upscale(item: tuple[Array, Array]) -> Bool[Array, "vh vw"]:
        def up(x: Float[Array, "h w"]) -> Bool[Array, "vh vw"]:
            return resize(x[None], size)[0] > 0

        return lax.cond(item[1], up, lambda x: jnp.zeros(size, bool), item[0])

    logits = logits.astype(jnp.float32)
    masks = strongest(logits, shown, size) if exclusive else lax.map(upscale, (logits, shown))
    out = resolve(masks, scores, phrases, ids, shown)
    return jnp.packbits(out.masks.reshape(len(ids), -1), axis=1), out.boxes, out.shown


def strongest(
    logits: Float[Array, "n h w"], shown: Bool[Array, " n"], size: tuple[int, int]
) -> Bool[Array, "n vh vw"]:
    """Masks at a video's size that share no pixel: the object with the largest logit has it."""

    def look(best: tuple[Array, Array], item: tuple[Array, Array, Array]) -> tuple:
        value, owner = best
        one, there, number = item
        up = jnp.where(there, resize(one[None], size)[0], -jnp.inf)
        better = up > value
        return (jnp.where(better, up, value), jnp.where(better, number, owner)), None

    numbers = jnp.arange(len(logits))
    nobody = jnp.zeros(size), jnp.full(size, -1)
    (_, owner), _ = lax.scan(look, nobody, (logits, shown, numbers))
    return owner == numbers[:, None, None]


def show(
    seen: Seen,
    shown: Bool[np.ndarray, " m"],
    phrases: tuple[str, ...],
    size: tuple[int, int],
    *,
    exclusive: bool = False,
) -> VideoFrame:
    """What is shown of a frame.

    Args:
      shown: which objects of its output are.
      phrases: of the session.
      size: (height, width) of the video.
      exclusive: see :func:`strongest`.
    """
    out = seen.output
    index = int(out.frame)
    if seen.logits is None:
        none = np.zeros(0, np.float32)
        return VideoFrame(
            index, out.ids[:0], np.zeros((0, *size), bool), np.zeros((0, 4), np.float32), none, (),
            none, seen.time, seen.error,
        )  # fmt: skip
    length = len(seen.logits)
    own = OWN - np.arange(len(out.ids), dtype=np.int32) if seen.overlapping else out.phrases
    packed, boxes, there = jax.device_get(
        _show(
            seen.logits,
            padded(out.tracker_scores.astype(np.float32), length, 0),
            padded(own.astype(np.int32), length, -1),
            padded(out.ids, length, -1),
            padded(shown, length, False),
            size=size,
            exclusive=exclusive,
        )
    )
    rows = np.flatnonzero(there)
    bits = np.unpackbits(packed[rows], axis=1, count=size[0] * size[1])
    return VideoFrame(
        index,
        out.ids[rows],
        bits.astype(bool).reshape(len(rows), *size),
        boxes[rows],
        out.scores[rows].astype(np.float32),
        tuple(phrases[p] if p >= 0 else "" for p in out.phrases[rows]),
        out.tracker_scores[rows].astype(np.float32),
        seen.time,
        seen.error,
    )

"""What a frame shows: when it is due, which masklets are hidden, who owns a pixel.

Outputs wait until hotstart and confirmation have had their say, so a masklet that is removed later
was never shown. Upstream: ``propagate_in_video`` and ``_postprocess_output`` in
``sam3/model/sam3_video_inference.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from sam3_jax.tracking.concepts.cleaning import clean_masks
from sam3_jax.tracking.concepts.config import ConceptConfig
from sam3_jax.tracking.concepts.shrinkage import NO_OBJECT_LOGIT


class FrameOutput(NamedTuple):
    """A frame's masklets in the order of their identities, and what is known about hiding them.

    A mask is the suppressed logits of its row (``rows`` >= 0) or the cleaned mask of a detection
    (``detections`` >= 0): exactly one of the two.
    """

    frame: Int[np.ndarray, ""]
    ids: Int[np.ndarray, " m"]
    phrases: Int[np.ndarray, " m"]
    scores: Float[np.ndarray, " m"]  # of the first detection
    tracker_scores: Float[np.ndarray, " m"]  # of this frame; a new object's is its detection's
    rows: Int[np.ndarray, " m"]
    detections: Int[np.ndarray, " m"]
    hidden: Bool[np.ndarray, " m"]  # out of keep-alive on this frame
    removed: Int[np.ndarray, " r"]  # identities that ended on this frame
    unconfirmed: Int[np.ndarray, " u"]  # identities, as of this frame


class Resolved(NamedTuple):
    """Masks as they are shown."""

    masks: Bool[Array, "n h w"]  # of one phrase: no pixel twice
    boxes: Float[Array, "n 4"]  # of the masks before pixels were given away; zeros where empty
    shown: Bool[Array, " n"]


def output_delay(config: ConceptConfig) -> int:
    """Frames that have to be waiting before the oldest is final; 1: it is final at once."""
    return max(config.hotstart, config.confirmation_frames if config.confirmation else 1, 1)


def release(
    config: ConceptConfig, waiting: Sequence[FrameOutput], *, delay: int, finished: bool
) -> list[tuple[FrameOutput, Bool[np.ndarray, " m"]]]:
    """The oldest frames that are due, each with which of its masklets are shown.

    A masklet's confirmation is read ``confirmation_frames`` - 1 frames ahead, or on the last frame
    that there is.

    Args:
      waiting: in the order of tracking. The caller drops those that come back.
      delay: the oldest is due once so many are waiting: :func:`output_delay`, or less to see
        frames early, with masklets that later turn out to be none. 0 is as 1.
      finished: nothing follows: all are due.
    """
    due = len(waiting) if finished else max(0, len(waiting) - max(delay, 1) + 1)
    removed = np.concatenate([np.zeros(0, np.int32), *(output.removed for output in waiting)])
    ahead = config.confirmation_frames - 1
    released = []
    for i, output in enumerate(waiting[:due]):
        unconfirmed = waiting[min(i + ahead, len(waiting) - 1)].unconfirmed
        gone = np.isin(output.ids, removed) | np.isin(output.ids, unconfirmed)
        released.append((output, ~(output.hidden | gone)))
    return released


def output_logits(
    config: ConceptConfig,
    tracks: Float[Array, "n h w"],
    detections: Float[Array, "d h w"],
    from_rows: Int[Array, " m"],
    from_detections: Int[Array, " m"],
) -> Float[Array, "m h w"]:
    """Low-resolution masks of a frame's output; those of new objects are cleaned here.

    Args:
      tracks: propagated, cleaned and suppressed.
      detections: of all phrases, as the detector gave them.
      from_rows: ``FrameOutput.rows``, padded with -1 to a fixed length.
      from_detections: ``FrameOutput.detections``, padded likewise.
    """
    new = (from_detections >= 0)[:, None, None]
    old = (from_rows >= 0)[:, None, None]

    def with_new(masks: Float[Array, "m h w"]) -> Float[Array, "m h w"]:
        found = clean_masks(detections[from_detections].astype(masks.dtype), config.clean_area)
        return jnp.where(new, found, masks)

    masks = jnp.where(old, tracks[from_rows], NO_OBJECT_LOGIT)
    return lax.cond(new.any(), with_new, lambda masks: masks, masks)


def mask_boxes(masks: Bool[Array, "n h w"]) -> Float[Array, "n 4"]:
    """Tight boxes (x0, y0, x1, y1) in pixel edges, zeros for empty masks.

    Upstream's x1 and y1 are the last pixel's index, one less.
    """
    columns, rows = masks.any(1), masks.any(2)
    corners = []
    for line in (columns, rows):
        corners.append(jnp.argmax(line, axis=1))
        corners.append(line.shape[1] - jnp.argmax(line[:, ::-1], axis=1))
    x0, x1, y0, y1 = corners
    boxes = jnp.stack([x0, y0, x1, y1], axis=1).astype(jnp.float32)
    return jnp.where(columns.any(1)[:, None], boxes, 0.0)


def separate(
    masks: Bool[Array, "n h w"],
    scores: Float[Array, " n"],
    phrases: Int[Array, " n"],
    ids: Int[Array, " n"],
) -> Bool[Array, "n h w"]:
    """Gives every pixel to the best masklet of each phrase there; of equals, the lower identity."""
    order = jnp.lexsort((ids, -scores, phrases))
    first = jnp.diff(phrases[order], prepend=phrases[order][:1] - 1) != 0

    def take(taken: Array, item: tuple[Array, Array]) -> tuple[Array, Array]:
        mask, first = item
        taken = taken & ~first
        return taken | mask, mask & ~taken

    _, owned = lax.scan(take, jnp.zeros(masks.shape[1:], bool), (masks[order], first))
    return jnp.zeros_like(masks).at[order].set(owned)


def resolve(
    masks: Bool[Array, "n h w"],
    tracker_scores: Float[Array, " n"],
    phrases: Int[Array, " n"],
    ids: Int[Array, " n"],
    shown: Bool[Array, " n"],
) -> Resolved:
    """Hides masklets, takes boxes, and then lets the masks of a phrase not overlap, in this order.

    Args:
      masks: at the size that is put out.
      tracker_scores: of this frame.
      shown: of :func:`release`. Empty masks are not shown either.
    """
    masks = masks & shown[:, None, None]
    owned = separate(masks, tracker_scores, phrases, ids)
    return Resolved(owned, mask_boxes(masks), masks.any((1, 2)))

"""One frame of tracking objects that a user clicked, where there is no phrase."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sam3_jax.inference.postprocess import sigmoid
from sam3_jax.models.tracker import Tracked
from sam3_jax.tracking.concepts.cleaning import clean_masks
from sam3_jax.tracking.concepts.outputs import FrameOutput
from sam3_jax.tracking.memories import Frame
from sam3_jax.types import Levels
from sam3_jax.video.buckets import with_rows
from sam3_jax.video.concept_programs import padded
from sam3_jax.video.edits import Edit
from sam3_jax.video.tracked import Kit, Latest, Tracking


@functools.partial(jax.jit, static_argnames="max_area")
def _in_order(
    found: tuple[Tracked, ...], order: Int[Array, " n"], *, max_area: int
) -> Float[Array, "n h w"]:
    """Masks of some rows, cleaned as they are shown."""
    masks = jnp.concatenate([one.masks.astype(jnp.float32) for one in found])
    return clean_masks(masks[order], max_area)


def track_objects(
    kit: Kit, tracking: Tracking, levels: Levels, frame: Frame, edits: list[Edit]
) -> Latest:
    """Tracks all objects; those that were prompted on this frame are what the prompt said.

    Args:
      edits: the prompts of this frame.
    """
    table, buckets = tracking.table, tracking.buckets
    found = buckets.track(levels, frame)
    said = prompted_rows(tracking, edits)
    for i, slots in said.items():
        found[i] = kit.programs.place(with_rows(found[i], slots))
    order = tracking.order
    logits = jax.device_get([one.object_logits for one in found])
    scores = sigmoid(np.concatenate(logits)[order])
    output = FrameOutput(
        frame=np.asarray(int(frame.index)),
        ids=table.ids[order],
        phrases=table.phrases[order],
        scores=table.scores[order],
        tracker_scores=scores,
        rows=order.astype(np.int32),
        detections=np.full(len(order), -1, np.int32),
        hidden=np.zeros(len(order), bool),
        removed=np.zeros(0, np.int32),
        unconfirmed=np.zeros(0, np.int32),
    )
    rows = padded(order.astype(np.int32), len(table.ids), 0)
    masks = _in_order(tuple(found), rows, max_area=kit.config.concepts.clean_area)
    return Latest(output, masks, tuple(found))


def prompted_rows(tracking: Tracking, edits: list[Edit]) -> dict[int, dict[int, Tracked]]:
    """What prompts said, by bucket and slot."""
    said: dict[int, dict[int, Tracked]] = {}
    for edit in edits:
        if tracking.has(edit.object_id):
            bucket, slot = divmod(tracking.table.row_of(edit.object_id), tracking.buckets.size)
            said.setdefault(bucket, {})[slot] = edit.found
    return said


def remember_prompts(
    tracking: Tracking, levels: Levels, frame: Frame, edits: list[Edit], *, together: bool
) -> None:
    """Makes a frame a prompted one of the objects that were prompted on it.

    ``together``: and of all others that were just tracked on it, as released.
    """
    buckets = tracking.buckets
    said = prompted_rows(tracking, edits)
    rows = np.zeros(buckets.rows, bool)
    rows[[i * buckets.size + slot for i, slots in said.items() for slot in slots]] = True
    seen: tuple[Tracked, ...] = ()
    if together and tracking.latest is not None and tracking.index == int(frame.index):
        seen = tracking.latest.found
        rows[tracking.latest.output.rows] = True
        rows &= tracking.table.live
    write = {i: own for i, own in enumerate(buckets.split(rows)) if own.any()}
    found = {
        i: with_rows(seen[i] if i < len(seen) else buckets.nothing, said.get(i, {})) for i in write
    }
    buckets.prompt(levels, frame, found, write)

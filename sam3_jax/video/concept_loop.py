"""One frame of concept tracking: what ``tracking.concepts.plan`` decides is carried out.

Upstream: ``_det_track_one_frame`` in ``sam3/model/sam3_video_base.py``. Objects that a user clicked
are tracked along; heuristics leave them alone.
"""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sam3_jax.models.tracker import Tracked
from sam3_jax.tracking.concepts.masklets import NONE
from sam3_jax.tracking.concepts.plan import Detected, FramePlan, plan_frame
from sam3_jax.tracking.concepts.shrinkage import MemoryMasks
from sam3_jax.tracking.memories import Frame
from sam3_jax.types import Levels
from sam3_jax.video.buckets import with_rows
from sam3_jax.video.concept_programs import padded
from sam3_jax.video.edits import Edit
from sam3_jax.video.object_loop import prompted_rows
from sam3_jax.video.phrases import Found, Phrase, detect
from sam3_jax.video.tracked import Birth, Kit, Latest, Tracking


def track_concepts(
    kit: Kit,
    tracking: Tracking,
    levels: Levels,
    trunk: Array,
    frame: Frame,
    edits: list[Edit],
    phrases: list[Phrase],
    unseen: Bool[np.ndarray, " n"],
) -> Latest:
    """Detects, propagates, decides, remembers; adds what is new and ends what is over.

    Objects that were born on this very frame, which is looked at again, are what their detections
    gave: upstream tracks no frame that has a prompt.

    Args:
      levels: the tracker's pyramid.
      trunk: of the same frame, for the detector.
      edits: the prompts of this frame.
      unseen: rows that a user has removed: they keep their detections, but hide no other object.
    """
    programs, table = kit.concepts, tracking.table
    tracking.buckets.reserve(len(table.ids))
    seen = detect(kit, trunk, phrases, int(frame.index))
    found = tracking.buckets.find(levels, frame)
    said, born = prompted_rows(tracking, edits), tracking.born_here()
    for i in said.keys() | born.keys():
        given = {**born.get(i, {}), **said.get(i, {})}
        found[i] = kit.programs.place(with_rows(found[i], given))
    tracks, measures, logits = programs.look(tuple(found), seen.masks, seen.kept, table.live)
    scores, kept, measures, logits = jax.device_get((seen.scores, seen.kept, measures, logits))
    visible = ~(unseen[:, None] | unseen)
    measures = measures._replace(track_track=measures.track_track * visible)
    plan = plan_frame(
        kit.config.concepts,
        table,
        Detected(scores, kept, seen.phrases),
        measures,
        logits,
        int(frame.index),
        backward=bool(frame.backward),
        unsearched=seen.unsearched,
    )
    n = len(table.ids)
    memory = programs.for_memory(tracks, plan.suppressed[:n], table.phrases, table.ids)
    size = tracking.buckets.size
    write = table.live.copy()
    write[[i * size + slot for i, slots in said.items() for slot in slots]] = False
    _remember(kit, tracking, levels, frame, found, memory, plan, write, seen.masks)
    _bear(kit, tracking, levels, frame, plan, seen)
    tracking.table = plan.table
    if plan.removed.any():
        tracking.buckets.remove(np.flatnonzero(plan.removed), plan.table.live)
    length = len(plan.table.ids)
    shown = programs.output(
        memory.logits,
        seen.masks,
        padded(plan.output.rows, length, -1),
        padded(plan.output.detections, length, -1),
    )
    return Latest(plan.output, shown, tuple(found))


def _remember(
    kit: Kit,
    tracking: Tracking,
    levels: Levels,
    frame: Frame,
    found: list[Tracked],
    memory: MemoryMasks,
    plan: FramePlan,
    write: Bool[np.ndarray, " n"],
    masks: Float[Array, "d h w"],
) -> None:
    """Encodes what was propagated; sure detections give new pointers and conditioning frames."""
    buckets = tracking.buckets
    none = np.zeros(buckets.size, bool)
    scores = buckets.scores(found)
    for i, (old, rows) in enumerate(zip(found, buckets.split(write), strict=True)):
        if not rows.any():
            continue
        here = slice(i * buckets.size, (i + 1) * buckets.size)
        chosen = plan.pointers[here]
        pointers = old.pointers
        if (chosen >= 0).any():
            given = kit.concepts.born(masks, chosen)
            pointers = buckets.programs.prompt_mask(buckets.params, levels, given).pointers
        first = np.asarray(here.start, np.int32)
        new = kit.concepts.bucket(memory, old, pointers, chosen >= 0, first)
        renewed = plan.conditioning[here] & rows
        buckets.memorize(i, levels, frame, new, rows, renewed, none, scores[i], concept=True)


def _bear(
    kit: Kit, tracking: Tracking, levels: Levels, frame: Frame, plan: FramePlan, seen: Found
) -> None:
    """Gives new objects their rows; their detections are their first prompts."""
    if not len(plan.born_rows):
        return
    buckets = tracking.buckets
    buckets.reserve(len(plan.table.ids))
    buckets.add(plan.born_rows, plan.table.groups[plan.born_rows])
    phrases = plan.table.phrases[plan.born_rows]
    for phrase in np.unique(phrases):
        mine = phrases == phrase
        rows, detections = plan.born_rows[mine], plan.born_detections[mine]
        ids = plan.table.ids[rows]
        _prompt(kit, tracking, levels, frame, seen.masks, rows, ids, detections.astype(np.int32))


def _prompt(
    kit: Kit,
    tracking: Tracking,
    levels: Levels,
    frame: Frame,
    masks: Float[Array, "d h w"],
    rows: Int[np.ndarray, " k"],
    ids: Int[np.ndarray, " k"],
    detections: Int[np.ndarray, " k"],
) -> None:
    """First prompts of one phrase's new objects, from whose masks later ones take pixels."""
    buckets = tracking.buckets
    length = -(-len(rows) // buckets.size) * buckets.size
    given = kit.concepts.born(masks, padded(detections, length, -1))
    places = np.full(buckets.rows, -1, np.int32)
    places[rows] = np.arange(len(rows))
    names = np.append(ids, NONE)
    for i, own in enumerate(buckets.split(places)):
        if (own >= 0).any():
            here = kit.concepts.pick(given, own)
            first = buckets.programs.prompt_mask(buckets.params, levels, here)
            tracking.births.append(Birth(i, names[own], first))
            buckets.memorize(i, levels, frame, first, own >= 0, own >= 0, own >= 0)

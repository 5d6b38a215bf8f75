"""One frame of concept tracking: every decision, in upstream's order.

The caller detects (:func:`~.detections.keep_detections` for each phrase), propagates without
encoding memory, cleans the masks, and measures them; :func:`plan_frame` then decides, and the
caller carries out: :func:`~.shrinkage.memory_masks` into the memory, reconditioned pointers, new
objects, removals. Upstream: ``_det_track_one_frame`` and ``run_tracker_update_planning_phase`` in
``sam3/model/sam3_video_base.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from sam3_jax.tracking.concepts import masklets
from sam3_jax.tracking.concepts.association import Matches, associate
from sam3_jax.tracking.concepts.births import within_limit, without_collisions
from sam3_jax.tracking.concepts.config import ConceptConfig
from sam3_jax.tracking.concepts.confirmation import confirm, unconfirmed
from sam3_jax.tracking.concepts.hotstart import count_frame, hidden, removals
from sam3_jax.tracking.concepts.masklets import Masklets
from sam3_jax.tracking.concepts.occlusion import note_occlusion, recently_occluded
from sam3_jax.tracking.concepts.outputs import FrameOutput
from sam3_jax.tracking.concepts.overlap import mask_areas, mask_overlap
from sam3_jax.tracking.concepts.reconditioning import recondition


class Measures(NamedTuple):
    """All that decisions need to know of the masks; small, so it is fetched from the device."""

    detection_track: Shaped[Array | np.ndarray, "d n"]  # by ``match_measure``
    track_track: Shaped[Array | np.ndarray, "n n"]  # IoU
    track_area: Shaped[Array | np.ndarray, " n"]  # pixels
    detection_detection: Shaped[Array | np.ndarray, "c c"]  # (0, 0) without a collision rule


class Detected(NamedTuple):
    """Detections of all phrases on a frame, padded; on the host."""

    scores: Float[np.ndarray, " d"]
    kept: Bool[np.ndarray, " d"]  # by :func:`~.detections.keep_detections`
    phrases: Int[np.ndarray, " d"]


class FramePlan(NamedTuple):
    """What is to be done with a frame. Rows are those of ``table``, which may have grown."""

    table: Masklets  # for the next frame
    suppressed: Bool[np.ndarray, " n"]  # masks to set to -10 before memory and output
    pointers: Int[np.ndarray, " n"]  # detection whose mask gives the row's pointer; -1: none
    conditioning: Bool[np.ndarray, " n"]  # the frame becomes a conditioning frame
    born_rows: Int[np.ndarray, " k"]
    born_detections: Int[np.ndarray, " k"]
    removed: Bool[np.ndarray, " n"]  # slots to free, after the births
    dropped: Int[np.ndarray, ""]  # new objects over ``max_objects``
    output: FrameOutput


def measure(
    config: ConceptConfig,
    detection_masks: Float[Array, "d h w"],
    kept: Bool[Array, " d"],
    track_masks: Float[Array, "n h w"],
    live: Bool[Array, " n"],
) -> Measures:
    """Overlaps of a frame's masks, on the device.

    Args:
      detection_masks: logits of all phrases' queries.
      track_masks: cleaned logits, one for each row of the table.
      live: rows in use.
    """
    found = (detection_masks > 0) & kept[:, None, None]
    tracks = (track_masks > 0) & live[:, None, None]
    collides = config.collision_overlap > 0
    rivals = found if collides else found[:0]
    return Measures(
        mask_overlap(found, tracks, config.match_measure),
        mask_overlap(tracks, tracks),
        mask_areas(tracks),
        mask_overlap(rivals, rivals, config.match_measure) if collides else jnp.zeros((0, 0)),
    )


def plan_frame(
    config: ConceptConfig,
    table: Masklets,
    detected: Detected,
    measures: Measures,
    object_logits: Float[np.ndarray, " n"],
    frame: int,
    *,
    backward: bool = False,
    unsearched: tuple[int, ...] = (),
) -> FramePlan:
    """Every decision about a frame.

    Args:
      table: of the frame before, in the direction of tracking.
      measures: of :func:`measure`, as numpy or device arrays.
      object_logits: the tracker's, for each row, before the sigmoid.
      frame: number of the frame.
      unsearched: phrases that no detector looked for on this frame (a prompt of boxes detects on
        its own frame only): their masklets are then neither matched nor unmatched. Upstream
        counts such frames as unmatched, which ends every masklet in its hotstart.
    """
    measures = Measures(*(np.asarray(x) for x in measures))
    matches = match_phrases(config, table, detected, measures, unsearched)
    born, dropped = _births(config, table, detected, measures, matches)

    after = count_frame(config, table, matches, backward=backward)
    ending = removals(config, after, frame, backward=backward)
    reconditioning = recondition(config, table, matches.supported, object_logits, frame)
    suppressed = recently_occluded(config, after, measures.track_track, ending, backward=backward)
    after = note_occlusion(config, after, measures.track_area, suppressed, frame)

    grown = masklets.with_room(after, len(born), config.bucket_size)
    grown, rows = masklets.add(
        grown,
        detected.phrases[born].astype(np.int32),
        detected.scores[born].astype(np.float32),
        frame=frame,
        keep_alive=config.keep_alive_start,
    )
    more = len(grown.ids) - len(table.ids)
    ending = np.pad(ending, (0, more))
    present = np.pad(matches.pairs.any(0), (0, more))
    present[rows] = True
    searched = grown.live & ~np.isin(grown.phrases, (masklets.NONE, *unsearched))
    new_table = confirm(config, masklets.remove(grown, ending), present, searched)
    return FramePlan(
        table=new_table,
        suppressed=np.pad(suppressed, (0, more)),
        pointers=np.pad(reconditioning.detections, (0, more), constant_values=-1),
        conditioning=np.pad(reconditioning.conditioning, (0, more)),
        born_rows=rows,
        born_detections=born,
        removed=ending,
        dropped=np.asarray(dropped),
        output=_output(config, table, grown, new_table, object_logits, rows, born, frame),
    )


def match_phrases(
    config: ConceptConfig,
    table: Masklets,
    detected: Detected,
    measures: Measures,
    unsearched: tuple[int, ...] = (),
) -> Matches:
    """:func:`~.association.associate` for each phrase on its own, over all rows and detections."""
    d, n = measures.detection_track.shape
    matches = Matches(
        pairs=np.zeros((d, n), bool),
        unmatched=np.zeros(n, bool),
        empty=np.zeros(n, bool),
        new=np.zeros(d, bool),
        supported=np.full(n, -1, np.int32),
    )
    known = np.union1d(table.phrases[table.live], detected.phrases[detected.kept])
    for phrase in np.setdiff1d(known, (masklets.NONE, *unsearched)):
        rows = np.flatnonzero(table.live & (table.phrases == phrase))
        rows = rows[np.argsort(table.ids[rows])]
        found = np.flatnonzero(detected.kept & (detected.phrases == phrase))
        own = associate(
            config,
            measures.detection_track[np.ix_(found, rows)],
            detected.scores[found],
            measures.track_area[rows],
        )
        matches.pairs[np.ix_(found, rows)] = own.pairs
        matches.unmatched[rows], matches.empty[rows] = own.unmatched, own.empty
        matches.new[found] = own.new
        sure = own.supported >= 0
        matches.supported[rows[sure]] = found[own.supported[sure]]
    return matches


def _births(
    config: ConceptConfig,
    table: Masklets,
    detected: Detected,
    measures: Measures,
    matches: Matches,
) -> tuple[Int[np.ndarray, " k"], int]:
    """Detections that become objects, and how many the limit left out."""
    new = matches.new
    if config.collision_overlap > 0:
        others = table.live[None] & (detected.phrases[:, None] != table.phrases[None])
        taken = np.where(others, measures.detection_track, 0.0).max(1, initial=0.0)
        between = measures.detection_detection
        new = without_collisions(
            new, detected.scores, detected.phrases, between, taken, config.collision_overlap
        )
    born = within_limit(new, detected.scores, config.max_objects - int(table.live.sum()))
    return born, int(new.sum()) - len(born)


def _output(
    config: ConceptConfig,
    before: Masklets,
    grown: Masklets,
    after: Masklets,
    object_logits: Float[np.ndarray, " n"],
    born_rows: Int[np.ndarray, " k"],
    born: Int[np.ndarray, " k"],
    frame: int,
) -> FrameOutput:
    """The frame's masklets, those that end on it included: outputs that wait show them no more."""
    rows = np.flatnonzero(grown.live)
    rows = rows[np.argsort(grown.ids[rows])]
    detections = np.full(len(grown.ids), -1, np.int32)
    detections[born_rows] = born
    tracker_scores = grown.scores.copy()
    old = np.flatnonzero(before.live)
    tracker_scores[old] = 0.5 * (1.0 + np.tanh(0.5 * object_logits[old].astype(np.float64)))
    detections = detections[rows]
    return FrameOutput(
        frame=np.asarray(frame),
        ids=grown.ids[rows],
        phrases=grown.phrases[rows],
        scores=grown.scores[rows],
        tracker_scores=tracker_scores[rows],
        rows=np.where(detections < 0, rows, -1).astype(np.int32),
        detections=detections,
        hidden=(hidden(config, grown) & after.live)[rows],
        removed=grown.ids[grown.live & ~after.live],
        unconfirmed=after.ids[unconfirmed(config, after)],
    )

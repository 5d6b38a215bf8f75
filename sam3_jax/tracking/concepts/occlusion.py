"""Of two masklets on one object the one that was hidden more recently gives way.

Upstream: ``_suppress_overlapping_based_on_recent_occlusion`` in
``sam3/model/sam3_video_base.py``.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

from sam3_jax.tracking.concepts.config import ConceptConfig
from sam3_jax.tracking.concepts.masklets import NONE, UNSEEN, Masklets


def recently_occluded(
    config: ConceptConfig,
    table: Masklets,
    iou: Float[np.ndarray, "n n"],
    ending: Bool[np.ndarray, " n"],
    *,
    backward: bool,
) -> Bool[np.ndarray, " n"]:
    """Masklets to suppress on this frame: they overlap one of their phrase that was hidden earlier.

    Both must have been hidden before. Upstream's comparison going backwards also suppresses a
    masklet that was never hidden; the rule here is the same in both directions.

    Args:
      ending: removed by hotstart. One that ends on the frame after its birth counts as hidden most
        recently of all.
    """
    if config.occlusion_iou <= 0:
        return np.zeros(len(table.ids), bool)
    when = (-1.0 if backward else 1.0) * table.last_occluded
    when[ending & (table.last_occluded == UNSEEN)] = np.inf
    hidden_before = table.live & ((table.last_occluded >= 0) | np.isinf(when))
    pairs = hidden_before[:, None] & hidden_before[None]
    pairs &= table.phrases[:, None] == table.phrases[None]
    pairs &= (iou >= config.occlusion_iou) & (when[:, None] > when[None])
    return pairs.any(1) & ~table.pinned


def note_occlusion(
    config: ConceptConfig,
    table: Masklets,
    areas: Int[np.ndarray, " n"],
    suppressed: Bool[np.ndarray, " n"],
    frame: int,
) -> Masklets:
    """Writes down which masklets are hidden on this frame: empty or suppressed."""
    if config.occlusion_iou <= 0:
        return table
    now = table.live & ((areas == 0) | suppressed)
    last = np.where(now, frame, np.maximum(table.last_occluded, NONE))
    return table._replace(last_occluded=last.astype(np.int32))

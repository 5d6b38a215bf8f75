"""When a sure detection makes the frame a conditioning frame of a masklet.

Upstream: ``_recondition_masklets`` in ``sam3/model/sam3_video_base.py``. The mask that is encoded
and shown stays the tracker's own; only the object pointer is taken from the detection's mask, and
the stored object logit becomes 10.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from sam3_jax.tracking.concepts.config import ConceptConfig
from sam3_jax.tracking.concepts.masklets import Masklets

OBJECT_LOGIT = 10.0  # stored for a reconditioned masklet


class Reconditioning(NamedTuple):
    """One entry for each row of the table."""

    detections: Int[np.ndarray, " n"]  # whose mask gives the pointer; -1: not reconditioned
    conditioning: Bool[np.ndarray, " n"]  # the frame becomes a conditioning frame


def recondition(
    config: ConceptConfig,
    table: Masklets,
    supported: Int[np.ndarray, " n"],
    object_logits: Float[np.ndarray, " n"],
    frame: int,
) -> Reconditioning:
    """Decides on frames divisible by ``config.recondition_every``.

    Args:
      supported: detection that supports the masklet, -1 for none.
      object_logits: the tracker's, of this frame, before the sigmoid.
    """
    due = config.recondition_every > 0 and frame % config.recondition_every == 0
    chosen = table.live & (supported >= 0) & (object_logits > config.recondition_logit) & due
    conditioning = chosen
    if config.recondition_together:
        conditioning = table.live & np.isin(table.groups, table.groups[chosen])
    return Reconditioning(np.where(chosen, supported, -1).astype(np.int32), conditioning)

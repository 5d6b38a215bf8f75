"""Masklets are shown once detections confirmed them on several frames running (SAM 3.1).

Upstream: ``update_masklet_confirmation_status`` in ``sam3/model/sam3_video_base.py``.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool

from sam3_jax.tracking.concepts.config import ConceptConfig
from sam3_jax.tracking.concepts.masklets import Masklets


def confirm(
    config: ConceptConfig,
    table: Masklets,
    detected: Bool[np.ndarray, " n"],
    searched: Bool[np.ndarray, " n"],
) -> Masklets:
    """Counts frames with a detection, the birth included; once confirmed, always confirmed.

    Args:
      table: after births.
      detected: matched or born on this frame.
      searched: a detector looked for its phrase on this frame; the others' counts stand still.
    """
    streak = np.where(detected, table.streak + 1, 0)
    streak = np.where(searched, streak, table.streak).astype(np.int32)
    confirmed = table.confirmed | (streak >= config.confirmation_frames)
    return table._replace(streak=streak, confirmed=confirmed)


def unconfirmed(config: ConceptConfig, table: Masklets) -> Bool[np.ndarray, " n"]:
    """Masklets that are not shown on the frames that look at this one."""
    return table.live & ~table.confirmed & ~table.pinned & config.confirmation

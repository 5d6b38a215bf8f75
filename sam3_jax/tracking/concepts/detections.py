"""Which of a phrase's detections on a frame count.

Upstream: ``sam3/perflib/nms.py``, ``run_backbone_and_detection`` in
``sam3/model/sam3_video_base.py``; the rule at the edge is SAM 3.1's.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from sam3_jax.tracking.concepts.config import ConceptConfig
from sam3_jax.tracking.concepts.overlap import mask_overlap


def greedy_nms(
    overlap: Float[Array, "q q"],
    scores: Float[Array, " q"],
    candidates: Bool[Array, " q"],
    threshold: float | Float[Array, ""],
) -> Bool[Array, " q"]:
    """Candidates that overlap no better one that is kept by more than ``threshold``.

    Of equal scores the first is the better one.
    """
    order = jnp.argsort(jnp.where(candidates, -scores, jnp.inf), stable=True)
    same = (overlap > threshold)[order][:, order]
    ranks = jnp.arange(len(scores))

    def drop_worse(rank: Array, keep: Array) -> Array:
        return keep & ~(keep[rank] & same[rank] & (ranks > rank))

    kept = lax.fori_loop(0, len(scores), drop_worse, candidates[order])
    return jnp.zeros_like(candidates).at[order].set(kept)


def within_margin(boxes: Float[Array, "q 4"], margin: float) -> Bool[Array, " q"]:
    """Boxes (x0, y0, x1, y1), fractions of the image, whose centre is not close to its edge."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    return jnp.all((centre > margin) & (centre < 1.0 - margin), axis=1)


def keep_detections(
    config: ConceptConfig,
    scores: Float[Array, " q"],
    masks: Float[Array, "q h w"],
    boxes: Float[Array, "q 4"],
) -> Bool[Array, " q"]:
    """Which queries of one phrase are detections.

    Args:
      scores: probability of the query times that of the phrase's presence.
      masks: logits at low resolution.
      boxes: (x0, y0, x1, y1), fractions of the image.
    """
    keep = scores > config.detection_score
    if config.nms_overlap > 0:
        overlap = mask_overlap(masks > 0, masks > 0, config.nms_measure)
        keep = greedy_nms(overlap, scores, keep, config.nms_overlap)
    if config.boundary_margin > 0:
        keep &= within_margin(boxes, config.boundary_margin)
    return keep

"""Which instances of the model's outputs are kept, and how they leave the devices.

Masks are by far the largest output, so only those that are kept are read back, their number rounded
up to a few sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from sam3_jax.inference import postprocess
from sam3_jax.inference.nms import nms
from sam3_jax.inference.options import DEFAULTS, Options
from sam3_jax.inference.programs import RawOutput, take_masks
from sam3_jax.inference.prompts import bucket

KEPT_BUCKETS = (1, 4, 16, 64, 256)  # masks that leave the device together


class Kept(NamedTuple):
    """Instances of one prompt as the model gives them, best score first."""

    scores: Float[np.ndarray, " n"]
    boxes: Float[np.ndarray, "n 4"]  # (cx, cy, w, h) fractions of the image
    logits: Float[np.ndarray, "n h w"]  # of the masks, at a quarter of the patch size
    semantic: Float[np.ndarray, "h w"] | None = None  # logits of the concept, where asked for


def keep_instances(
    out: RawOutput,
    thresholds: Sequence[float],
    options: Options = DEFAULTS,
    *,
    likely: Sequence[Array] | None = None,
    semantic: bool = False,
) -> list[Kept]:
    """The instances of the first ``len(thresholds)`` prompts, read back from the devices.

    ``likely``: queries whose masks were asked for before it was known which will be kept, and
    these masks.
    """
    logits, presence, boxes = jax.device_get((out.pred_logits, out.presence_logits, out.pred_boxes))
    scores = postprocess.instance_scores(logits, presence if options.presence else None)
    maps = np.asarray(out.semantic_seg) if semantic else None
    there = None if likely is None else jax.device_get(likely)
    kept = []
    for i, threshold in enumerate(thresholds):
        chosen = postprocess.select(scores[i], threshold)
        masks = there and _among(chosen, there[0][i], there[1][i])
        if masks is None:
            queries = np.zeros(bucket(len(chosen), KEPT_BUCKETS), np.int32)
            queries[: len(chosen)] = chosen
            masks = np.asarray(take_masks(out.pred_masks, np.int32(i), queries))[: len(chosen)]
        instances = _thin_out(Kept(scores[i][chosen], boxes[i][chosen], masks), options)
        if semantic:
            instances = instances._replace(semantic=maps[i])
        kept.append(instances)
    return kept


def _among(
    chosen: Int[np.ndarray, " n"],
    queries: Int[np.ndarray, " m"],
    masks: Float[np.ndarray, "m h w"],
) -> Float[np.ndarray, "n h w"] | None:
    """The masks of the chosen queries, None where they are not all among ``queries``."""
    order = np.argsort(queries)
    places = order[np.searchsorted(queries, chosen, sorter=order).clip(max=len(order) - 1)]
    return masks[places] if (queries[places] == chosen).all() else None


def _thin_out(kept: Kept, options: Options) -> Kept:
    """Without duplicates, and no more than were asked for."""
    if options.nms != "none" and len(kept.scores) > 1:
        rest = nms(
            kept.logits > 0, kept.scores, measure=options.nms, threshold=options.nms_threshold
        )
        kept = Kept(*(field[rest] for field in kept[:3]))
    if options.max_instances:
        kept = Kept(*(field[: options.max_instances] for field in kept[:3]))
    return kept

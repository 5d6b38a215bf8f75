"""Masks on their way into memory: prompts given as masks, overlaps, the encoder's scale.

Upstream: ``add_new_mask`` and ``_consolidate_temp_output_across_obj``
(``sam3/model/sam3_tracking_predictor.py``), ``_encode_new_memory`` and
``_apply_non_overlapping_constraints`` (``sam3/model/sam3_tracker_base.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from sam3_jax.models.tracker import ABSENT
from sam3_jax.ops.image import resize_bilinear
from sam3_jax.tracking.config import TrackerConfig

OVERLAPPED = -10.0  # greatest logit of a mask where another one wins


class MaskPrompt(NamedTuple):
    """Masks as prompts: 0..1 at 16 times the coarsest map, logits +-1024 at the finest level's."""

    masks: Float[Array, "s mh mw"]
    logits: Float[Array, "s h w"]


def resize(
    masks: Float[Array, "s h w"], size: tuple[int, int], *, antialias: bool = False
) -> Float[Array, "s h2 w2"]:
    """Bilinear, half-pixel centres."""
    return resize_bilinear(masks[..., None], size, antialias=antialias)[..., 0]


def mask_prompt(
    masks: Float[Array, "s mh mw"] | Bool[Array, "s mh mw"],
    order: Int[Array, " s"],
    grid: tuple[int, int],
    video: tuple[int, int] | None = None,
) -> MaskPrompt:
    """Masks as prompts.

    Args:
      masks: 0..1, of any size.
      order: when each was given. In memory and output, a later mask takes its pixels from earlier
        ones; the pointers see whole masks.
      grid: (height, width) of the coarsest feature map.
      video: (height, width) of the video, where a pixel is on a mask from above one half (None: the
        masks have this size).
    """
    video = masks.shape[1:] if video is None else video

    def harden(mask: Array) -> Bool[Array, "vh vw"]:
        return resize(mask[None].astype(jnp.float32), video, antialias=True)[0] > 0.5

    def soften(hard: Bool[Array, "vh vw"]) -> Float[Array, "h w"]:
        logits = jnp.where(hard, -ABSENT, ABSENT)[None]
        return resize(logits, (4 * grid[0], 4 * grid[1]), antialias=True)[0]

    # One by one: float masks of a whole bucket at a large video's size would be gigabytes.
    hard = lax.map(harden, masks)
    later = jnp.where(hard, order[:, None, None], -1).max(axis=0)
    hard &= order[:, None, None] >= later
    fine = resize(masks.astype(jnp.float32), (16 * grid[0], 16 * grid[1]), antialias=True)
    return MaskPrompt(fine, lax.map(soften, hard))


def non_overlapping(
    logits: Float[Array, "s h w"], group: Int[Array, " s"], among: Bool[Array, " s"]
) -> Float[Array, "s h w"]:
    """Leaves every pixel to one object of each group, the one with the highest logit.

    Objects outside ``among`` neither win nor lose; of equals the first slot wins.
    """

    def lose(i: Int[Array, ""]) -> Bool[Array, "h w"]:
        rivals = among & (group == group[i])
        winner = jnp.argmax(jnp.where(rivals[:, None, None], logits, -jnp.inf), axis=0)
        return (winner != i) & among[i]

    lost = lax.map(lose, jnp.arange(len(group)))
    return jnp.where(lost, jnp.minimum(logits, OVERLAPPED), logits)


def separate(
    logits: Sequence[Float[Array, "s h w"]],
    groups: Sequence[Int[Array, " s"]],
    among: Sequence[Bool[Array, " s"]],
    *,
    size: tuple[int, int],
) -> tuple[Float[Array, "s h2 w2"], ...]:
    """:func:`non_overlapping` over several buckets, at the size where masks become hard."""
    ends = np.cumsum([len(group) for group in groups])[:-1]
    joined = resize(jnp.concatenate(logits).astype(jnp.float32), size)
    alone = non_overlapping(joined, jnp.concatenate(groups), jnp.concatenate(among))
    return tuple(jnp.split(alone, ends))


def memory_masks(
    logits: Float[Array, "s h w"],
    prompted: Bool[Array, " s"],
    group: Int[Array, " s"],
    size: tuple[int, int],
    config: TrackerConfig,
) -> Float[Array, "s h2 w2"]:
    """Mask logits to what the memory encoder reads: probability x 20 - 10.

    ``prompted`` masks do not overlap and are hard. Logits are resized to ``size`` first.
    """
    logits = resize(logits.astype(jnp.float32), size)

    def harden(x: Float[Array, "s h w"]) -> Float[Array, "s h w"]:
        alone = non_overlapping(x, group, prompted) if config.non_overlapping_prompts else x
        hard = alone > 0
        return jnp.where(prompted[:, None, None], hard.astype(x.dtype), jax.nn.sigmoid(x))

    values = lax.cond(prompted.any(), harden, jax.nn.sigmoid, logits)
    return values * config.mask_scale + config.mask_bias

"""Loss of the interactive head and the tracker's masks.

Upstream's formulas are those of ``MultiStepMultiMasksAndIous`` in ``sam3/train/loss/loss_fns.py``;
a session of several clicks sums this over its steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from sam3_jax.ops.image import resize_bilinear
from sam3_jax.ops.losses import iou_l1, mask_dice, mask_focal, object_loss
from sam3_jax.types import ClickOutput

Terms = dict[str, Float[Array, ""]]


@dataclass
class InteractiveLossConfig:
    """Constants of :func:`interactive_loss`: the paper's 20 : 1 : 1 : 1."""

    mask_weight: float = 20.0
    dice_weight: float = 1.0
    iou_weight: float = 1.0
    object_weight: float = 1.0
    mask_alpha: float = 0.25
    mask_gamma: float = 2.0
    object_alpha: float = -1.0  # negative: no class weights
    object_gamma: float = 0.0


def interactive_loss(
    out: ClickOutput,
    masks: Shaped[Array, "p h w"],
    valid: Bool[Array, " p"],
    multimask: Bool[Array, " p"],
    config: InteractiveLossConfig,
    *,
    replicas: int = 1,
) -> tuple[Float[Array, ""], Terms]:
    """Loss of one click step of P prompts, and its terms before weighting.

    Only the hypothesis with the lowest focal + dice loss (weighted) learns mask, dice and IoU, and
    only where the object exists, that is where its mask is not empty. The object score always
    learns. Sums are divided by the number of valid prompts, at least ``replicas``.

    Args:
      masks: targets, boolean or 0..1, at the size of the comparison; empty: not in this frame.
      valid: prompts that are not padding.
      multimask: choose among the multimasks (hypotheses 1 and up), else the single mask alone.
    """
    goal = rearrange(masks, "p h w -> p (h w)")

    def compare(x: tuple[Array, Array]) -> Array:
        logits, iou = x
        logits = resize_bilinear(logits[..., None].astype(jnp.float32), masks.shape[1:])
        logits = rearrange(logits, "p h w 1 -> p (h w)")
        focal = mask_focal(logits, goal, alpha=config.mask_alpha, gamma=config.mask_gamma)
        return jnp.stack([focal, mask_dice(logits, goal), iou_l1(iou, logits, goal)])

    # One hypothesis at a time: at full size each is a float map of 4 MB a prompt.
    hypotheses = jnp.moveaxis(out.masks, 1, 0), jnp.moveaxis(out.iou, 1, 0)
    losses = rearrange(lax.map(jax.checkpoint(compare), hypotheses), "m t p -> t p m")
    combined = config.mask_weight * losses[0] + config.dice_weight * losses[1]
    is_multi = jnp.arange(out.masks.shape[1]) > 0
    candidate = is_multi == multimask[:, None]
    best = jnp.argmin(jnp.where(candidate, combined, jnp.inf), axis=1)
    losses = jnp.take_along_axis(losses, best[None, :, None], axis=2)[..., 0]

    exists = (goal > 0).any(-1)
    count = jnp.maximum(valid.sum(), replicas).astype(jnp.float32)
    score = object_loss(
        out.object_logits, exists, alpha=config.object_alpha, gamma=config.object_gamma
    )
    mask, dice, iou = jnp.where(exists & valid, losses, 0.0).sum(-1) / count
    terms = {
        "click_mask": mask,
        "click_dice": dice,
        "click_iou": iou,
        "click_object": jnp.where(valid, score, 0.0).sum() / count,
    }
    weights = (
        config.mask_weight,
        config.dice_weight,
        config.iou_weight,
        config.object_weight,
    )
    total = sum(w * x for w, x in zip(weights, terms.values(), strict=True))
    return total, terms

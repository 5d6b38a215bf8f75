"""Terms of the training losses, element by element (upstream ``sam3/train/loss/loss_fns.py``).

Everything is float32, whatever the inputs are. Sums over queries, pairs and images, and weights,
belong to :mod:`sam3_jax.training.criterion`; the constants here are the released recipe's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped


def bce_with_logits(
    logits: Float[Array, "*n"], targets: Shaped[Array, "*n"] | float
) -> Float[Array, "*n"]:
    """Binary cross-entropy; ``targets`` are probabilities.

    A sum of positive terms: it keeps its digits where the loss is small, which softplus(x) - x t
    does not, and its gradient at 0 is right, which max(x, 0) - x t + log1p(exp(-|x|)) has not.
    """
    logits, targets = logits.astype(jnp.float32), jnp.asarray(targets, jnp.float32)
    return targets * jax.nn.softplus(-logits) + (1 - targets) * jax.nn.softplus(logits)


def focal_loss(
    logits: Float[Array, "*n"], targets: Shaped[Array, "*n"], *, alpha: float, gamma: float
) -> Float[Array, "*n"]:
    """alpha_t (1 - p_t)^gamma BCE, elementwise; a negative alpha leaves alpha_t out."""
    logits, targets = logits.astype(jnp.float32), targets.astype(jnp.float32)
    loss = bce_with_logits(logits, targets)
    # 1 - p_t, without the cancellation of 1 - sigmoid.
    miss = targets * jax.nn.sigmoid(-logits) + (1 - targets) * jax.nn.sigmoid(logits)
    loss = loss * _power(miss, gamma)
    return loss if alpha < 0 else loss * (alpha * targets + (1 - alpha) * (1 - targets))


def class_target(
    logits: Float[Array, "*n"],
    iou: Float[Array, "*n"],
    *,
    alpha: float = 0.25,
    floor: float = 0.01,
) -> Float[Array, "*n"]:
    """Soft target of a matched query, max(floor, p^alpha IoU^(1 - alpha)), without gradient."""
    p, iou = lax.stop_gradient((jax.nn.sigmoid(logits.astype(jnp.float32)), iou))
    return jnp.maximum(floor, p**alpha * iou.astype(jnp.float32) ** (1 - alpha))


def class_loss(
    logits: Float[Array, "*n"],
    iou: Float[Array, "*n"],
    matched: Bool[Array, "*n"],
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    floor: float = 0.01,
    pos_weight: float = 10.0,
) -> Float[Array, "*n"]:
    """Class loss of every query (``IABCEMdetr`` upstream).

    Args:
      iou: of the query's box with that of its target; ignored where not ``matched``.

    Matched queries: ``pos_weight`` BCE(logit, :func:`class_target`). The others: p^gamma
    BCE(logit, 0), with the gradient of p.
    """
    logits = logits.astype(jnp.float32)
    soft = class_target(logits, iou, alpha=alpha, floor=floor)
    positive = pos_weight * bce_with_logits(logits, soft)
    negative = _power(jax.nn.sigmoid(logits), gamma) * bce_with_logits(logits, 0.0)
    return jnp.where(matched, positive, negative)


def presence_loss(
    logits: Float[Array, "*n"],
    present: Bool[Array, "*n"],
    *,
    alpha: float = 0.5,
    gamma: float = 0.0,
) -> Float[Array, "*n"]:
    """Focal loss of "the image shows the concept"."""
    return focal_loss(logits, present, alpha=alpha, gamma=gamma)


def box_l1(
    boxes: Float[Array, "*b q 4"], targets: Float[Array, "*b n 4"]
) -> Float[Array, "*b q n"]:
    """Sum of the absolute differences of (cx, cy, w, h), every query with every target."""
    boxes, targets = boxes.astype(jnp.float32), targets.astype(jnp.float32)
    return jnp.abs(boxes[..., :, None, :] - targets[..., None, :, :]).sum(-1)


def mask_focal(
    logits: Float[Array, "*b n"],
    targets: Shaped[Array, "*b n"],
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Float[Array, "*b"]:
    """Focal loss, mean over the n pixels (or points) of each mask."""
    return focal_loss(logits, targets, alpha=alpha, gamma=gamma).mean(-1)


def mask_dice(logits: Float[Array, "*b n"], targets: Shaped[Array, "*b n"]) -> Float[Array, "*b"]:
    """1 - (2 sum(p t) + 1) / (sum p + sum t + 1) over the n pixels (or points) of each mask."""
    p, targets = jax.nn.sigmoid(logits.astype(jnp.float32)), targets.astype(jnp.float32)
    return 1 - (2 * (p * targets).sum(-1) + 1) / (p.sum(-1) + targets.sum(-1) + 1)


def iou_l1(
    predicted: Float[Array, "*b"], logits: Float[Array, "*b n"], targets: Shaped[Array, "*b n"]
) -> Float[Array, "*b"]:
    """|predicted IoU - IoU of the mask ``logits`` > 0 with the target|; 0 if both are empty."""
    mask, target = logits > 0, targets > 0
    inner, union = ((x.sum(-1).astype(jnp.float32)) for x in (mask & target, mask | target))
    return jnp.abs(predicted.astype(jnp.float32) - inner / jnp.maximum(union, 1.0))


def object_loss(
    logits: Float[Array, "*n"],
    present: Bool[Array, "*n"],
    *,
    alpha: float = -1.0,
    gamma: float = 0.0,
) -> Float[Array, "*n"]:
    """Loss of "the object is in this frame"; with the released constants plain BCE."""
    return focal_loss(logits, present, alpha=alpha, gamma=gamma)


def _power(x: Float[Array, "*n"], exponent: float) -> Float[Array, "*n"]:
    """x ** exponent for x >= 0; whole exponents have finite gradients at 0."""
    if float(exponent).is_integer() and exponent >= 0:
        return lax.integer_pow(x, int(exponent))
    return x**exponent

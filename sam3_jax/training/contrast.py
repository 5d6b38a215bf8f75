"""Objects and the phrases that name them, by contrast: a start for trunk and text encoder.

The released model's come from Perception Encoder, which learned them by contrast of pictures with
captions (arXiv:2504.13181; paper section 3, "Detector architecture"). A model that starts from
random values needs something in their place: what a phrase is about is learned here from many times
as many pictures a second as by the whole detector.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Shaped

from sam3_jax.ops.image import resize_bilinear
from sam3_jax.ops.losses import mask_dice, mask_focal
from sam3_jax.training.targets import Targets
from sam3_jax.training.update import Metrics
from sam3_jax.types import Levels, TextFeatures


@dataclass
class ContrastConfig:
    """Constants of :func:`contrast_loss` and, where ``regions`` is not 0, :func:`region_loss`."""

    along: float = 0.0  # weight of them beside the detector's own losses (task "pictures")
    temperature: float = 0.1  # the cosines are divided by
    regions: float = 0.0  # weight of the phrases' regions on the finest map
    margin: float = 0.5  # cosine from which a pixel is one of a phrase's region
    alpha: float = 0.6  # of the focal loss, as for the semantic map
    focal_share: float = 0.4  # of the region loss; the rest is dice


def unused_by_contrast(config: ContrastConfig) -> tuple[str, ...]:
    """Paths (patterns) that no loss reaches: all but trunk, text encoder and the neck's levels.

    Objects are pooled from the level that prompts are read against, regions lie on the finest.
    """
    levels = "[02]" if config.regions else "2"
    return (rf"^(?!vision/trunk/|vision/detector_neck/level_{levels}_|text/)",)


def contrast_losses(
    levels: Levels,
    text: TextFeatures,
    tokens: Int[Array, "p t"],
    targets: Targets,
    config: ContrastConfig,
) -> tuple[Float[Array, ""], Metrics]:
    """What ``config`` asks for of the losses below, weighted, on the B images' levels."""
    loss, metrics = contrast_loss(levels[-1], text, tokens, targets, config)
    if config.regions:
        term, more = region_loss(levels[0], text, targets, config)
        loss, metrics = loss + config.regions * term, metrics | more
    return loss, metrics


def contrast_loss(
    maps: Float[Array, "b h w d"],
    text: TextFeatures,
    tokens: Int[Array, "p t"],
    targets: Targets,
    config: ContrastConfig,
) -> tuple[Float[Array, ""], Metrics]:
    """Cross entropy of which of the batch's phrases an object was named by (InfoNCE).

    An object is the mean of its image's map under its mask, a phrase the mean of its tokens; both
    are compared by their cosine. A phrase that the batch has several times counts once.

    Args:
      maps: of the B images, whose P prompts follow each other image by image.
      tokens: ids of the phrases, zero padded.

    Returns:
      The mean over all objects of all phrases, and the metrics ``contrast`` (the same) and
      ``named``: the share whose own phrase came first.
    """
    objects, seen = pool_objects(maps, targets)
    phrases = _mean(text.tokens, text.mask)
    cosine = jnp.einsum("pnd,qd->pnq", _unit(objects), _unit(phrases))
    same = (tokens[:, None] == tokens[None]).all(-1)
    own = jnp.eye(len(tokens), dtype=bool)
    rivals = ~same & targets.prompt_valid[None]
    logits = jnp.where((own | rivals)[:, None], cosine / config.temperature, -jnp.inf)
    labels = jnp.broadcast_to(jnp.arange(len(tokens))[:, None], logits.shape[:2])
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    counted = (seen & targets.valid & targets.prompt_valid[:, None]).astype(jnp.float32)
    count = jnp.maximum(counted.sum(), 1.0)
    loss = (counted * entropy).sum() / count
    named = (counted * (logits.argmax(-1) == labels)).sum() / count
    return loss, {"contrast": loss, "named": named}


def region_loss(
    maps: Float[Array, "b h w d"], text: TextFeatures, targets: Targets, config: ContrastConfig
) -> tuple[Float[Array, ""], Metrics]:
    """Where a phrase's objects are, pixel by pixel, so that maps keep outlines, too.

    A pixel belongs to a phrase's region by the cosine of the two. Focal loss over all phrases of
    the image (those that name nothing in it have empty regions), dice over those that name
    something.

    Args:
      maps: the finest level of the B images.

    Returns:
      The weighted sum, and the metric ``regions`` (the same).
    """
    phrases = _unit(_mean(text.tokens, text.mask))
    phrases = phrases.reshape(maps.shape[0], -1, phrases.shape[-1])
    cosine = jnp.einsum("bhwd,bpd->bphw", _unit(maps.astype(jnp.float32)), phrases)
    cosine = cosine.reshape(-1, *maps.shape[1:3], 1)
    size = targets.semantic.shape[1:]
    logits = (resize_bilinear(cosine, size) - config.margin) / config.temperature
    logits, goal = logits.reshape(len(logits), -1), targets.semantic.reshape(len(logits), -1)

    def mean(losses: Float[Array, " p"], counted: Bool[Array, " p"]) -> Float[Array, ""]:
        return jnp.where(counted, losses, 0.0).sum() / jnp.maximum(counted.sum(), 1)

    focal = mean(mask_focal(logits, goal, alpha=config.alpha), targets.prompt_valid)
    dice = mean(mask_dice(logits, goal), targets.prompt_valid & (goal > 0).any(-1))
    loss = config.focal_share * focal + (1 - config.focal_share) * dice
    return loss, {"regions": loss}


def pool_objects(
    maps: Float[Array, "b h w d"], targets: Targets
) -> tuple[Float[Array, "p n d"], Bool[Array, "p n"]]:
    """Means of the maps under the targets' masks, and whether there is anything under them."""
    prompts, count = targets.masks.shape[:2]
    images, height, width, dim = maps.shape
    cover = jax.image.resize(
        targets.masks.astype(jnp.float32), (prompts, count, height, width), "linear"
    )
    area = cover.sum((2, 3))
    cover = cover.reshape(images, -1, height, width)
    sums = jnp.einsum("bmhw,bhwd->bmd", cover, maps.astype(jnp.float32))
    means = sums.reshape(prompts, count, dim) / jnp.maximum(area, 1e-6)[..., None]
    return means, area > 0


def _mean(x: Shaped[Array, "p t d"], mask: Bool[Array, "p t"]) -> Float[Array, "p d"]:
    weight = mask.astype(jnp.float32)[..., None]
    return (x * weight).sum(1) / jnp.maximum(weight.sum(1), 1.0)


def _unit(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    return x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)

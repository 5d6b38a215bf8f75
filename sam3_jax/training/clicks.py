"""Sessions of a simulated user who clicks on an object and then corrects what comes back.

As upstream trains its interactive head (``sam3/model/sam3_tracker_base.py`` and its
``_iter_correct_pt_sampling``): a first point or box, then points drawn from where the prediction is
wrong, each with the masks so far as a further prompt. The whole session is part of the step: the
corrections are drawn on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from sam3_jax.ops.image import resize_bilinear
from sam3_jax.training.batch import Clicks
from sam3_jax.training.interactive import InteractiveLossConfig, Terms, interactive_loss
from sam3_jax.types import ClickOutput, ClickPrompt

LOW_RES_CLAMP = 32.0  # of the logits that are shown to the model again, as in inference


@dataclass
class ClickConfig:
    """Training of the interactive head, on ``data.example.clicks`` objects an image.

    ``weight`` multiplies its loss; 0: the head does not train. ``alone``: nothing else does, and
    the detector is not run. ``corrections``: clicks after the first prompt, the paper's 7.

    ``disc``: radius in pixels; if not 0, a disc around the first point takes the object's place. A
    head from random values learns by it where a click is: from objects it first learns masks of
    everything that may be one, and stays there for long.
    """

    weight: float = 0.0
    alone: bool = False
    corrections: int = 7
    disc: float = 0.0
    loss: InteractiveLossConfig = field(default_factory=InteractiveLossConfig)


def click_loss(
    click: Callable[[ClickPrompt], ClickOutput],
    clicks: Clicks,
    config: ClickConfig,
    key: PRNGKeyArray,
    *,
    frame: int,
    mask_side: int,
    replicas: int = 1,
) -> tuple[Float[Array, ""], Terms]:
    """Summed loss of all rounds, before ``weight``, and its terms.

    As upstream, several hypotheses compete as long as there is a single point.

    Args:
      click: the model on the images at hand; object o is on image o // C.
      clicks: B images with C objects each.
      frame: side of the input frame, whose pixels the points are.
      mask_side: of the masks that the model gives and takes.
      replicas: see :func:`interactive_loss`.

    Returns the total and the terms of :func:`interactive_loss`, summed over the rounds;
    ``click_first_iou`` and ``click_last_iou`` besides: the chosen masks' mean IoU.
    """
    clicks = Clicks(*(rearrange(x, "b c ... -> (b c) ...") for x in clicks))
    if config.disc:
        clicks = clicks._replace(masks=_discs(clicks, config.disc, frame))
    slots = ((0, 0), (0, config.corrections))
    points = jnp.pad(clicks.points.astype(jnp.float32), (*slots, (0, 0)))
    labels = jnp.pad(clicks.labels, slots, constant_values=-2)
    no_mask = jnp.zeros((len(points), mask_side, mask_side), jnp.float32)

    def play(carry: tuple, round_: tuple) -> tuple[tuple, tuple]:
        points, labels, shown = carry
        number, key = round_
        has_mask = jnp.broadcast_to(number > 0, clicks.valid.shape)
        out = click(ClickPrompt(points, labels, shown, has_mask))
        multimask = (labels >= 0).sum(1) == 1
        total, terms = interactive_loss(
            out, clicks.masks, clicks.valid, multimask, config.loss, replicas=replicas
        )
        logits = lax.stop_gradient(_chosen(out, multimask)).astype(jnp.float32)
        predicted = resize_bilinear(logits[..., None], clicks.masks.shape[1:])[..., 0] > 0
        point, label = correct(predicted, clicks.masks, key, frame=frame)
        # The last round's correction finds no slot and is dropped.
        points = points.at[:, 2 + number].set(point, mode="drop")
        labels = labels.at[:, 2 + number].set(jnp.where(clicks.valid, label, -2), mode="drop")
        shown = jnp.clip(logits, -LOW_RES_CLAMP, LOW_RES_CLAMP)
        return (points, labels, shown), (total, terms, _mean_iou(predicted, clicks))

    rounds = config.corrections + 1
    steps = jnp.arange(rounds), jax.random.split(key, rounds)
    _, (totals, terms, ious) = lax.scan(jax.checkpoint(play), (points, labels, no_mask), steps)
    terms = jax.tree.map(jnp.sum, terms)
    return totals.sum(), terms | {"click_first_iou": ious[0], "click_last_iou": ious[-1]}


def correct(
    predicted: Bool[Array, "p h w"],
    masks: Bool[Array, "p h w"],
    key: PRNGKeyArray,
    *,
    frame: int,
) -> tuple[Float[Array, "p 2"], Array]:
    """A point drawn from the wrong pixels of each mask, and its label (1 on the object, 0 off).

    Where nothing is wrong it lies on the object; where there is no object either, anywhere.

    Args:
      frame: side of the frame whose pixels (x, y) the point is in; the masks cover it.
    """
    height, width = masks.shape[1:]
    flat = rearrange(jnp.stack([predicted != masks, masks]), "k p h w -> k p (h w)")
    wrong, goal = flat[0], flat[1]
    region = jnp.where(wrong.any(1, keepdims=True), wrong, goal)
    drawn = jax.random.uniform(key, region.shape) + region  # region's pixels win
    index = jnp.argmax(drawn, axis=1)
    row, column = index // width, index % width
    xy = jnp.stack([(column + 0.5) / width, (row + 0.5) / height], axis=1)
    label = jnp.take_along_axis(goal, index[:, None], axis=1)[:, 0]
    return xy * frame, label.astype(jnp.int32)


def _discs(clicks: Clicks, radius: float, frame: int) -> Bool[Array, "p h w"]:
    """Where the frame is nearer than ``radius`` to each first point."""
    height, width = clicks.masks.shape[1:]
    y, x = ((jnp.arange(size) + 0.5) * frame / size for size in (height, width))
    at = clicks.points[:, 0].astype(jnp.float32)
    across, down = x - at[:, :1], y - at[:, 1:]
    return jnp.square(down)[:, :, None] + jnp.square(across)[:, None] < radius**2


def _chosen(out: ClickOutput, multimask: Bool[Array, " p"]) -> Float[Array, "p h w"]:
    """The mask that a user would see: the best of several by the model's own estimate, or one."""
    best = 1 + jnp.argmax(out.iou[:, 1:], axis=1)
    index = jnp.where(multimask, best, 0)
    return jnp.take_along_axis(out.masks, index[:, None, None, None], axis=1)[:, 0]


def _mean_iou(predicted: Bool[Array, "p h w"], clicks: Clicks) -> Float[Array, ""]:
    both = (predicted & clicks.masks).sum((1, 2))
    either = (predicted | clicks.masks).sum((1, 2))
    iou = jnp.where(clicks.valid, both / jnp.maximum(either, 1), 0.0)
    return iou.sum() / jnp.maximum(clicks.valid.sum(), 1)

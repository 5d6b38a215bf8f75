"""How a simulated user shows the tracker an object: masks, points and boxes, on which frames.

Upstream does not release its training of the tracker. The probabilities are those of SAM 2's
(arXiv 2408.00714, appendix on training): a mask half of the time, else a point or a box; one or two
frames are prompted, and where the first prompt was no mask, corrective clicks follow on up to two
frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sam3_jax.models.sam_heads import PADDING
from sam3_jax.training.clicks import correct

MASK, POINT, BOX = range(3)  # kinds of a first prompt
NOTHING, PROMPT, CORRECTION = range(3)  # what happens on the second prompted frame


@dataclass
class PromptingConfig:
    """Chances of a user's deeds.

    ``mask``, ``box``: of an object's first prompt; otherwise it is a point. ``second_prompt``: of
    another prompted frame anywhere behind the first; ``second_correction``: of a later frame whose
    tracked mask is corrected instead. Which frame that is, all clips of a micro-batch share; it has
    a prompt, or corrections, for all objects but those that were given by masks, which nobody
    corrects. ``corrections``: clicks after each first point or box, and on the corrected frame.
    ``on_object``: of a click that is drawn from the object instead of the error.
    """

    mask: float = 0.5
    box: float = 0.25
    second_prompt: float = 0.5
    second_correction: float = 0.25
    corrections: int = 7
    on_object: float = 0.1
    box_noise: float = 0.1  # of the box's sides
    box_noise_max: float = 20.0  # in 1008ths of the frame's side


class Plan(NamedTuple):
    """What happens to a micro-batch of S objects. ``second``: the other prompted frame's number."""

    kinds: Int[Array, " s"]
    deed: Int[Array, ""]
    second: Int[Array, ""]


def draw_plan(key: PRNGKeyArray, objects: int, frames: int, config: PromptingConfig) -> Plan:
    """Draws it; clips of one frame have no second one."""
    kind, deed, second = jax.random.split(key, 3)
    share = jax.random.uniform(kind, (objects,))
    kinds = jnp.where(share < config.mask, MASK, POINT)
    is_box = (share >= config.mask) & (share < config.mask + config.box)
    share = jax.random.uniform(deed)
    deeds = jnp.where(share < config.second_prompt + config.second_correction, CORRECTION, NOTHING)
    deeds = jnp.where(share < config.second_prompt, PROMPT, deeds)
    return Plan(
        jnp.where(is_box, BOX, kinds),
        deeds if frames > 1 else jnp.int32(NOTHING),
        jax.random.randint(second, (), 1, max(frames, 2)),
    )


def first_points(
    masks: Bool[Array, "s h w"],
    kinds: Int[Array, " s"],
    key: PRNGKeyArray,
    config: PromptingConfig,
    *,
    frame: int,
) -> tuple[Float[Array, "s 2 2"], Int[Array, "s 2"]]:
    """Points of a prompt, (x, y) in pixels of the frame, and labels as ``ClickPrompt`` has them.

    A point is drawn from the mask; a box is the mask's with edges that moved a little. Objects that
    are given by masks have padding alone.
    """
    drawn, noise = jax.random.split(key)
    point, _ = correct(jnp.zeros_like(masks), masks, drawn, frame=frame)
    points = jnp.stack([point, jnp.zeros_like(point)], axis=1)
    boxes = noisy_boxes(masks, noise, config, frame=frame)
    is_box = (kinds == BOX)[:, None]
    labels = jnp.where(is_box, jnp.array([2, 3]), jnp.array([1, PADDING]))
    labels = jnp.where((kinds == MASK)[:, None], PADDING, labels)
    return jnp.where(is_box[..., None], boxes, points), labels


def noisy_boxes(
    masks: Bool[Array, "s h w"], key: PRNGKeyArray, config: PromptingConfig, *, frame: int
) -> Float[Array, "s 2 2"]:
    """Boxes around masks as somebody would draw them: (x0, y0), (x1, y1) in pixels of the frame.

    Each edge moves by a normal deviate of ``box_noise`` sides, within limits, and stays in the
    frame; so far that no area is left, none of them moves. An empty mask has a box of the frame.
    """

    def extent(hits: Bool[Array, "s n"]) -> Float[Array, "s 2"]:
        count = hits.shape[1]
        last = count - jnp.argmax(hits[:, ::-1], axis=1)
        low, high = jnp.argmax(hits, axis=1), last
        return jnp.stack([low, high], axis=1) * (frame / count)

    x, y = extent(masks.any(1)), extent(masks.any(2))
    corners = jnp.stack([x, y], axis=2)  # (s, low or high, x or y)
    sides = corners[:, 1:] - corners[:, :1]
    limit = config.box_noise_max * frame / 1008
    noise = config.box_noise * sides * jax.random.normal(key, corners.shape)
    moved = jnp.clip(corners + jnp.clip(noise, -limit, limit), 0, frame)
    whole = (moved[:, 1] > moved[:, 0]).all(1)[:, None, None]
    return jnp.where(whole, moved, corners)

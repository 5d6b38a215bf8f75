"""What is asked about one frame of a clip, what comes back, and corrections of it.

As :mod:`sam3_jax.training.clicks` on pictures, but that the map which is read may hold memory and
need no prompt, and that the last answer is kept, to be remembered. Upstream:
``_iter_correct_pt_sampling`` of SAM 2's training code, whose hooks are in
``sam3/model/sam3_tracker_base.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sam3_jax.models.sam_heads import NOT_A_POINT, PADDING
from sam3_jax.ops.image import resize_bilinear
from sam3_jax.training.clicks import LOW_RES_CLAMP, correct
from sam3_jax.training.interactive import InteractiveLossConfig, Terms, interactive_loss
from sam3_jax.types import ClickOutput, ClickPrompt

Heads = Callable[[ClickPrompt], ClickOutput]


class Answer(NamedTuple):
    """The hypothesis of S objects that counts: mask logits, estimate, presence, its token."""

    masks: Float[Array, "s h w"]
    iou: Float[Array, " s"]
    object_logits: Float[Array, " s"]
    tokens: Float[Array, "s d"]


class Question(NamedTuple):
    """A frame's first prompt of S objects, and what the answers are compared with.

    ``labels`` as ``ClickPrompt`` has them; NOT_A_POINT where nobody prompts and memory alone says
    what is meant. ``judged``: objects whose first answer counts; ``corrected``: those that are
    corrected, and whose later answers count.
    """

    points: Float[Array, "s 2 2"]
    labels: Int[Array, "s 2"]
    masks: Bool[Array, "s h w"]
    judged: Bool[Array, " s"]
    corrected: Bool[Array, " s"]


class Rules(NamedTuple):
    """What stays the same over a clip. ``frame``: side of a frame, whose pixels points are."""

    loss: InteractiveLossConfig
    replicas: int
    frame: int
    corrections: int
    on_object: float
    mask_size: tuple[int, int]  # of the masks that the model gives and takes


def answer_of(out: ClickOutput, multimask: Bool[Array, " s"]) -> Answer:
    """The best of three by the model's own estimate, or the single mask; never one for the other.

    (At inference a single mask that is not stable gives way. Upstream trains without.)
    """
    index = jnp.where(multimask, 1 + jnp.argmax(out.iou[:, 1:], axis=1), 0)

    def take(values: Array) -> Array:
        return jax.vmap(lambda v, i: v[i])(values, index)

    return Answer(take(out.masks), take(out.iou), out.object_logits, take(out.tokens))


def converse(
    heads: Heads, asked: Question, key: PRNGKeyArray, rules: Rules
) -> tuple[Answer, Float[Array, ""], Terms]:
    """The first answer, then corrections: each answer comes after one more point.

    Where nobody is corrected, further rounds are not computed. Three masks compete as long as there
    is at most one point.

    Returns the last answer of those who were corrected and the first one of the others, the loss
    summed over the rounds, and its terms likewise.
    """
    slots = ((0, 0), (0, rules.corrections))
    points = jnp.pad(asked.points, (*slots, (0, 0)))
    labels = jnp.pad(asked.labels, slots, constant_values=PADDING)

    def play(carry: tuple, number: Array, key: PRNGKeyArray) -> tuple[tuple, tuple]:
        points, labels, shown, before = carry
        first = number == 0
        limited = jnp.clip(lax.stop_gradient(shown), -LOW_RES_CLAMP, LOW_RES_CLAMP)
        has_mask = jnp.broadcast_to(~first, asked.judged.shape)
        out = heads(ClickPrompt(points, labels, limited, has_mask))
        multimask = (labels >= 0).sum(1) <= 1
        judged = jnp.where(first, asked.judged, asked.judged & asked.corrected)
        total, terms = interactive_loss(
            out, asked.masks, judged, multimask, rules.loss, replicas=rules.replicas
        )
        answer = choose(first | asked.corrected, answer_of(out, multimask), before)
        point, label = next_click(answer.masks, asked.masks, key, rules)
        labels = jnp.where(labels == NOT_A_POINT, PADDING, labels)
        # The last round's correction finds no slot and is dropped.
        points = points.at[:, 2 + number].set(point, mode="drop")
        labels = labels.at[:, 2 + number].set(label, mode="drop")
        return (points, labels, answer.masks, answer), (total, terms)

    blank = jax.eval_shape(heads, _shape_of_prompt(points, labels, rules))
    blank = jax.eval_shape(answer_of, blank, asked.judged)
    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), blank)
    carry = (points, labels, jnp.zeros_like(blank.masks), blank)

    def round_(carry: tuple, step: tuple) -> tuple[tuple, tuple]:
        wanted = (step[0] == 0) | asked.corrected.any()
        return step_if(wanted, jax.checkpoint(play), carry, *step)

    rounds = rules.corrections + 1
    steps = jnp.arange(rounds), jax.random.split(key, rounds)
    (*_, answer), (totals, terms) = lax.scan(round_, carry, steps)
    return answer, totals.sum(), jax.tree.map(jnp.sum, terms)


def step_if(
    happens: Bool[Array, ""], step: Callable[..., tuple], carry: Any, *args: Any
) -> tuple[Any, Any]:
    """``step(carry, *args)``, a (carry, outputs) as of a scan; where it does not happen, nothing is
    computed: the carry stays and the outputs are zeros.
    """
    outputs = jax.eval_shape(step, carry, *args)[1]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outputs)
    return lax.cond(happens, step, lambda carry, *_: (carry, zeros), carry, *args)


def choose(which: Bool[Array, " s"], first: Answer, second: Answer) -> Answer:
    """Object by object, ``first`` where ``which``."""
    return jax.tree.map(
        lambda a, b: jnp.where(which.reshape(-1, *[1] * (a.ndim - 1)), a, b), first, second
    )


def next_click(
    logits: Float[Array, "s h w"], masks: Bool[Array, "s mh mw"], key: PRNGKeyArray, rules: Rules
) -> tuple[Float[Array, "s 2"], Int[Array, " s"]]:
    """A correction: from the wrong pixels, sometimes (``on_object``) from the whole object."""
    drawn, chance = jax.random.split(key)
    predicted = resize_bilinear(lax.stop_gradient(logits)[..., None], masks.shape[1:])[..., 0] > 0
    anywhere = jax.random.uniform(chance, (len(masks), 1, 1)) < rules.on_object
    predicted &= ~(anywhere & masks.any((1, 2), keepdims=True))
    return correct(predicted, masks, drawn, frame=rules.frame)


def seen_iou(
    answer: Answer, masks: Bool[Array, "s h w"], counted: Bool[Array, " s"]
) -> Float[Array, ""]:
    """Mean IoU over the objects that are in the frame."""
    logits = lax.stop_gradient(answer.masks)[..., None].astype(jnp.float32)
    found = resize_bilinear(logits, masks.shape[1:])[..., 0] > 0
    found &= (answer.object_logits > 0)[:, None, None]
    both, either = (x.sum((1, 2)) for x in (found & masks, found | masks))
    seen = counted & masks.any((1, 2))
    return jnp.where(seen, both / jnp.maximum(either, 1), 0.0).sum() / jnp.maximum(seen.sum(), 1)


def _shape_of_prompt(points: Array, labels: Array, rules: Rules) -> ClickPrompt:
    return ClickPrompt(
        points,
        labels,
        jax.ShapeDtypeStruct((len(points), *rules.mask_size), jnp.float32),
        jax.ShapeDtypeStruct((len(points),), bool),
    )

"""What happens to one frame of a clip: its objects are found, and remembered.

A function of the state, like those of :mod:`sam3_jax.tracking.step`, which sessions call; what is
remembered and read is decided by the same code.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sam3_jax.models.detector import Sam3
from sam3_jax.models.sam_heads import NOT_A_POINT, PADDING
from sam3_jax.models.tracker import ABSENT, Recall, Tracked
from sam3_jax.tracking.masks import resize
from sam3_jax.tracking.memories import Frame
from sam3_jax.tracking.state import TrackState, has_conditioning
from sam3_jax.tracking.step import PRESENT, Setup, memorize, recall
from sam3_jax.training.conversation import Answer, Question, Rules, converse, seen_iou
from sam3_jax.training.interactive import Terms
from sam3_jax.training.tracker_prompts import (
    CORRECTION,
    MASK,
    Plan,
    PromptingConfig,
    first_points,
)
from sam3_jax.types import ClickOutput, ClickPrompt, Levels


class Clips(NamedTuple):
    """A micro-batch as S = B x M objects, and how the model is called for it."""

    module: Sam3
    params: dict
    setup: Setup
    rules: Rules
    prompting: PromptingConfig
    trunk: Float[Array, "t b h w c"]
    masks: Bool[Array, "t s mh mw"]
    known: Bool[Array, "t s"]
    valid: Bool[Array, " s"]
    plan: Plan
    total: Int[Array, ""]  # frames of the video, as far as pointers are told

    def run(self, method: Any, *args: Any, key: PRNGKeyArray | None = None) -> Any:
        """A function of the bound model; with ``key`` there is dropout."""
        rngs = None if key is None else {"dropout": key}
        return self.module.apply({"params": self.params}, *args, method=method, rngs=rngs)

    def levels(self, index: Int[Array, ""]) -> Levels:
        """The tracker's pyramid of a frame, for each object its clip's."""
        trunk = lax.dynamic_index_in_dim(self.trunk, index, keepdims=False)
        levels = self.run("tracker_levels", trunk)
        # Repeating, unlike indexing, needs nothing from other devices.
        objects = len(self.valid) // len(trunk)
        return tuple(jnp.repeat(level, objects, axis=0) for level in levels)


class Event(NamedTuple):
    """One thing that happens: a frame is prompted, or (``prompted`` False) tracked."""

    index: Int[Array, ""]
    prompted: Bool[Array, ""]
    happens: Bool[Array, ""]
    dropout: PRNGKeyArray
    user: PRNGKeyArray


def happen(
    clips: Clips, state: TrackState, event: Event
) -> tuple[TrackState, tuple[Float[Array, ""], Terms, Float[Array, ""]]]:
    """Finds the objects in a frame, by prompts or by memory, and remembers them.

    To be called where ``event.happens`` alone, which it does not look at.
    """
    levels, frame = clips.levels(event.index), _frame(clips, event.index)
    masks, known = (
        lax.dynamic_index_in_dim(x, event.index, keepdims=False) for x in (clips.masks, clips.known)
    )
    before = has_conditioning(state, frame, clips.setup.config)
    by_mask = clips.plan.kinds == MASK
    # Nobody points at what is not there, but on the first frame, where all is.
    there = (event.index == 0) | (known & masks.any((1, 2)))
    write = jnp.where(event.prompted, there, ~before)
    corrected = (clips.plan.deed == CORRECTION) & (clips.plan.second == event.index)
    clicked = write & ~by_mask & (event.prompted | corrected)
    judged = write & clips.valid & known & ~(event.prompted & by_mask)

    first, later = jax.random.split(event.user)
    points, labels = first_points(
        masks, clips.plan.kinds, first, clips.prompting, frame=clips.rules.frame
    )
    nothing = jnp.array([NOT_A_POINT, PADDING])
    labels = jnp.where(event.prompted, labels, nothing)
    coarse = _read_memory(clips, state, frame, levels[2], event)

    def heads(click: ClickPrompt) -> ClickOutput:
        return clips.run(_heads, (*levels[:2], coarse), click)

    asked = Question(points, labels, masks, judged, clicked)
    answer, total, terms = converse(heads, asked, later, clips.rules)
    found = _tracked(clips, answer)
    given = event.prompted & by_mask
    found = lax.cond(given.any(), lambda: _give(clips, levels, masks, given, found), lambda: found)
    nobody = jnp.zeros_like(write)
    state = memorize(
        clips.params,
        state,
        levels,
        frame,
        found,
        write,
        write & (event.prompted | clicked),
        nobody,
        setup=clips.setup,
    )
    return state, (total, terms, seen_iou(answer, masks, judged))


def _frame(clips: Clips, index: Int[Array, ""]) -> Frame:
    return Frame(index, clips.total, jnp.asarray(False))


def _read_memory(
    clips: Clips, state: TrackState, frame: Frame, coarse: Float[Array, "s h w d"], event: Event
) -> Float[Array, "s h w d"]:
    """The coarsest map with what is remembered in it, or with the learned absence of memory."""
    config, model = clips.setup.config, clips.module.config
    memory = recall(state, frame, config)
    # The prompted frames' row is the table's last, however few maps are read.
    rows = jnp.where(memory.rows == config.num_maps, model.memory.num_maps, memory.rows) - 1
    memory = memory._replace(rows=rows)
    noisy = model.memory.dropout > 0

    def condition(module: Sam3, coarse: Array, memory: Recall) -> Array:
        return module.tracker.condition(coarse, memory, deterministic=not noisy)

    def absence(module: Sam3, coarse: Array) -> Array:
        return coarse + module.tracker.no_memory_embed()[0].astype(coarse.dtype)

    dropout = event.dropout if noisy else None
    return lax.cond(
        event.prompted,
        lambda: clips.run(absence, coarse),
        lambda: clips.run(condition, coarse, memory, key=dropout).astype(coarse.dtype),
    )


def _tracked(clips: Clips, answer: Answer) -> Tracked:
    """An answer as tracking remembers it: nowhere, with the pointer of absence, where not seen."""

    def point(module: Sam3, tokens: Array, logits: Array) -> Array:
        return module.tracker.object_pointer(tokens, logits)

    pointers = clips.run(point, answer.tokens, answer.object_logits)
    present = (answer.object_logits > 0)[:, None, None]
    masks = jnp.where(present, answer.masks, ABSENT)
    return Tracked(masks, answer.iou, answer.object_logits, pointers)


def _give(
    clips: Clips,
    levels: Levels,
    masks: Bool[Array, "s h w"],
    given: Bool[Array, " s"],
    found: Tracked,
) -> Tracked:
    """``found``, with masks as prompts for ``given`` objects: each by itself, and hard."""
    height, width = levels[2].shape[1:3]
    fine = resize(masks.astype(jnp.float32), (16 * height, 16 * width))
    pointers = clips.run("mask_pointer", levels, fine)
    logits = resize(jnp.where(masks, -ABSENT, ABSENT), clips.rules.mask_size, antialias=True)
    present = jnp.where(masks.any((1, 2)), PRESENT, -PRESENT).astype(jnp.float32)
    prompts = Tracked(logits, jnp.ones_like(present), present, pointers)
    return Tracked(
        *(
            jnp.where(given.reshape(-1, *[1] * (b.ndim - 1)), a.astype(b.dtype), b)
            for a, b in zip(prompts, found, strict=True)
        )
    )


def _heads(module: Sam3, levels: Levels, click: ClickPrompt) -> ClickOutput:
    return module.tracker.heads(levels, click)

"""Tracking one frame: find the objects of a bucket, remember them, take prompts.

Upstream: ``track_step`` (``sam3/model/sam3_tracker_base.py``) and its callers. Finding
(:func:`propagate`) does not touch memory and remembering (:func:`memorize`) does nothing else, so
that something may decide between them what is worth remembering; :func:`track` is both, for pure
tracking, and :func:`track_chunk` runs it over several frames. ``params`` are the model's, and all
functions are pure: :class:`sam3_jax.tracking.programs.Programs` jits them.

A frame's features are the tracker's pyramid of one image (``encode_image(...).tracker``), which all
objects share. On a frame where an object was prompted, ``track`` returns what tracking would have
found and leaves its memory alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from sam3_jax.config import ModelConfig
from sam3_jax.models.detector import Sam3
from sam3_jax.models.tracker import ABSENT, Recall, Tracked
from sam3_jax.tracking.config import TrackerConfig
from sam3_jax.tracking.masks import MaskPrompt, memory_masks, resize
from sam3_jax.tracking.memories import (
    Frame,
    group_score,
    memory_score,
    recall_maps,
    recall_pointers,
)
from sam3_jax.tracking.state import TrackState, has_conditioning, remember
from sam3_jax.types import ClickPrompt, Levels

PRESENT = 10.0  # object logit of a mask prompt that is not empty; of an empty one -10
Params = dict[str, Any]


class Setup(NamedTuple):
    """What does not change in a session: the model, in its compute dtype, and the rules."""

    model: Sam3
    config: TrackerConfig

    def apply(self, params: Params, *args: Any, method: str, **static: bool) -> Any:
        """One of the model's entry points."""
        return self.model.apply({"params": params}, *args, method=method, **static)


def recall(state: TrackState, frame: Frame, config: TrackerConfig) -> Recall:
    """What a frame reads of a bucket's memory: at most 4 + 6 maps and 4 + 15 pointers."""
    rank = recall_maps(state.map_frames, state.map_good, frame, config)
    read = config.max_conditioning + config.num_maps - 1
    maps = state.maps
    if read < rank.shape[1]:
        first = jnp.argsort(rank == 0, axis=1, stable=True)[:, :read]
        rank = jnp.take_along_axis(rank, first, axis=1)
        maps = jax.vmap(lambda m, i: m[i])(maps, first)
    times, mask = recall_pointers(state.pointer_frames, state.pointer_good, frame, config)
    return Recall(maps, rank, state.pointers, times, mask)


def propagate(
    params: Params, state: TrackState, levels: Levels, frame: Frame, *, setup: Setup
) -> Tracked:
    """Finds every object of the bucket in a frame. Free slots give absent objects."""
    config = setup.config
    memory = recall(state, frame, config)
    # The prompted frames' row is the table's last, however few maps are read.
    last = setup.model.config.memory.num_maps
    rows = jnp.where(memory.rows == config.num_maps, last, memory.rows) - 1
    least, most = config.multimask_points
    found = setup.apply(
        params, levels, memory._replace(rows=rows), method="track", multimask=least <= 0 <= most
    )
    free = ~state.valid
    return found._replace(
        masks=jnp.where(free[:, None, None], ABSENT, found.masks),
        iou=jnp.where(free, 0.0, found.iou),
        object_logits=jnp.where(free, -PRESENT, found.object_logits),
    )


def prompt(params: Params, levels: Levels, click: ClickPrompt, *, setup: Setup) -> Tracked:
    """Segments what points and boxes mean on a frame, one prompt a slot, without memory.

    A correction gives the logits so far as ``mask_input``; they are clamped to +-32 here. Slots
    without a point give absent objects. Nothing is remembered: see :func:`memorize`.
    """
    config = setup.config
    points = (click.labels >= 0).sum(axis=1)
    least, most = config.multimask_points
    limit = config.previous_logits_clamp
    click = click._replace(mask_input=jnp.clip(click.mask_input, -limit, limit))
    found = setup.apply(
        params, levels, click, (points >= least) & (points <= most), method="click_one"
    )
    none = points == 0
    return found._replace(
        masks=jnp.where(none[:, None, None], ABSENT, found.masks),
        iou=jnp.where(none, 0.0, found.iou),
        object_logits=jnp.where(none, -PRESENT, found.object_logits),
    )


def prompt_mask(params: Params, levels: Levels, given: MaskPrompt, *, setup: Setup) -> Tracked:
    """Takes masks as they are (``tracking.masks.mask_prompt``) and finds their pointers."""
    pointers = setup.apply(params, levels, given.masks, method="mask_pointer")
    present = (given.masks > 0).any(axis=(1, 2))
    # Strongly typed, as all outputs: else what reads them compiles once more.
    logits = jnp.where(present, PRESENT, -PRESENT).astype(jnp.float32)
    return Tracked(given.logits, jnp.ones_like(logits), logits, pointers)


def frame_scores(state: TrackState, found: Tracked, config: TrackerConfig) -> Float[Array, " s"]:
    """Score of this frame for memory selection: an object's own, or that of its group."""
    if config.selection == "session":
        return group_score(found.object_logits, found.iou, state.group, state.valid)
    return memory_score(found.object_logits, found.iou)


def joint_scores(
    states: Sequence[TrackState], found: Sequence[Tracked]
) -> tuple[Float[Array, " s"], ...]:
    """:func:`frame_scores` where a group's objects may be in several buckets, for each of them."""

    def joined(parts: list[Array]) -> Array:
        return jnp.concatenate(parts)

    logits, iou = joined([one.object_logits for one in found]), joined([one.iou for one in found])
    groups, valid = joined([s.group for s in states]), joined([s.valid for s in states])
    ends = np.cumsum([len(state.valid) for state in states])[:-1]
    return tuple(jnp.split(group_score(logits, iou, groups, valid), ends))


def frame_size(model: ModelConfig) -> tuple[int, int]:
    """(height, width) of masks when they become probabilities, those of concepts excepted."""
    return (model.image_size // model.vision.patch_size * model.vision.patch_size,) * 2


def memorize(
    params: Params,
    state: TrackState,
    levels: Levels,
    frame: Frame,
    found: Tracked,
    write: Bool[Array, " s"],
    conditioning: Bool[Array, " s"],
    prompted: Bool[Array, " s"],
    scores: Float[Array, " s"] | None = None,
    *,
    setup: Setup,
    concept: bool = False,
) -> TrackState:
    """Remembers what was found, or what somebody made of it.

    Args:
      found: masks may be logits at any size; those at the encoder's own size (16 times the coarsest
        map) are not resized.
      write: objects to remember; free slots never are.
      conditioning: this frame becomes a prompted one of these objects.
      prompted: these masks come from a prompt: hard, without overlap among them within a group.
      scores: of the frame, for memory selection; None: :func:`frame_scores`.
      concept: as in concept tracking: logits are resized to the encoder's size before they become
        probabilities (else to the frame's size), and an object is present where its mask has a
        pixel (else where its logit is positive).
    """
    config, model = setup.config, setup.model.config
    height, width = levels[2].shape[1:3]
    cell = 16 if concept else model.vision.patch_size
    if found.masks.shape[1:] == (16 * height, 16 * width):
        cell = 16
    masks, size = found.masks, (cell * height, cell * width)
    if concept:
        masks = resize(masks, size)
        present = (masks > 0).any(axis=(1, 2))
    else:
        present = found.object_logits > 0
    write = write & state.valid
    values = memory_masks(masks, prompted & write, state.group, size, config)
    maps = setup.apply(params, levels[2], values, present, method="encode_memory")
    scores = frame_scores(state, found, config) if scores is None else scores
    return remember(state, frame, maps, found.pointers, scores, write, conditioning & write, config)


def track(
    params: Params, state: TrackState, levels: Levels, frame: Frame, *, setup: Setup
) -> tuple[TrackState, Tracked]:
    """Finds and remembers all objects but those that were prompted on this frame."""
    found = propagate(params, state, levels, frame, setup=setup)
    return memorize_tracked(params, state, levels, frame, found, setup=setup), found


def memorize_tracked(
    params: Params,
    state: TrackState,
    levels: Levels,
    frame: Frame,
    found: Tracked,
    scores: Float[Array, " s"] | None = None,
    *,
    setup: Setup,
) -> TrackState:
    """Remembers all objects but those that were prompted on this frame; see :func:`memorize`."""
    none = jnp.zeros_like(state.valid)
    write = ~has_conditioning(state, frame, setup.config)
    return memorize(params, state, levels, frame, found, write, none, none, scores, setup=setup)


def track_chunk(
    params: Params, state: TrackState, levels: Levels, frame: Frame, *, setup: Setup
) -> tuple[TrackState, Tracked]:
    """:func:`track` over T frames in one program.

    Args:
      levels: pyramids of T images in the order of tracking.
      frame: the first of them.

    Returns the state after the last, and what was found on each: arrays (t, s, ...).
    """

    def body(state: TrackState, step: tuple) -> tuple[TrackState, Tracked]:
        number, level = step
        index = frame.index + jnp.where(frame.backward, -number, number)
        now = frame._replace(index=index)
        return track(params, state, tuple(x[None] for x in level), now, setup=setup)

    return lax.scan(body, state, (jnp.arange(len(levels[0])), levels))

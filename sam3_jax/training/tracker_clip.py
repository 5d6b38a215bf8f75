"""Loss of clips: prompts on the first frame, tracking through the others, as at inference.

Stage 4 of SAM 3's training (arXiv 2511.16719); upstream does not release it, and SAM 2's
(arXiv 2408.00714) fills what the paper leaves open. The clips' objects are the slots of one bucket,
and what is remembered and read is decided by the functions that sessions call
(:mod:`sam3_jax.tracking`), without memory selection. All that happens to a clip is one scan;
gradients go through all of its steps.

As upstream, masks that points gave are remembered as probabilities (at inference they are hard),
and objects of a clip may overlap. Unlike upstream, pointers of prompted frames are read only once
tracking has passed these, as at inference.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from sam3_jax.models.detector import Sam3
from sam3_jax.sharding import constrain_batch
from sam3_jax.tracking.config import TrackerConfig
from sam3_jax.tracking.state import TrackState, empty_state
from sam3_jax.tracking.step import Setup
from sam3_jax.training.batch import normalize
from sam3_jax.training.clip_batch import ClipBatch
from sam3_jax.training.conversation import Rules, step_if
from sam3_jax.training.interactive import InteractiveLossConfig, Terms
from sam3_jax.training.tracker_frame import Clips, Event, happen
from sam3_jax.training.tracker_prompts import PROMPT, Plan, PromptingConfig, draw_plan


@dataclass
class TrackerTrainingConfig:
    """Training of the tracker.

    ``told_frames``: length of the video that the pointers' temporal positions are relative to; 0:
    the clip's own, as upstream. Clips that are much shorter than what is tracked later learn
    positions that do not come again: tell 16 (or more, it is the same). ``remat``: the backward
    pass computes frames again, instead of keeping all of them in memory; rounds of clicks and the
    masks' losses are computed again in any case.
    """

    prompting: PromptingConfig = field(default_factory=PromptingConfig)
    loss: InteractiveLossConfig = field(default_factory=InteractiveLossConfig)
    told_frames: int = 0
    remat: bool = True


def training_rules(num_maps: int, frames: int) -> TrackerConfig:
    """What a frame of a clip reads: at most two prompted frames, and those right before it."""
    return TrackerConfig(
        num_maps=max(2, min(num_maps, frames)),
        max_conditioning=2,
        stored_conditioning=2,
        selection="none",
        non_overlapping_prompts=False,
    )


def clip_loss(
    module: Sam3,
    params: dict,
    batch: ClipBatch,
    config: TrackerTrainingConfig,
    key: PRNGKeyArray,
    *,
    replicas: int = 1,
) -> tuple[Float[Array, ""], Terms]:
    """Loss of B clips, summed over frames and rounds of clicks, and its terms.

    Nothing in front of the tracker's neck gets a gradient.

    Args:
      replicas: see :func:`sam3_jax.training.interactive.interactive_loss`.

    Returns the total and its terms before weighting, summed likewise; besides the mean IoU of
    objects in the frame: ``prompted_iou``, after the first frame's clicks, ``tracked_iou``, over
    all later frames, and ``last_iou``, on the last one.
    """
    clips, key = _prepare(module, params, batch, config, key, replicas)
    slots, grid = len(clips.valid), clips.trunk.shape[2:4]
    state = empty_state(
        clips.setup.config, module.config, dtype=module.dtype, slots=slots, grid=grid
    )
    state = constrain_batch(state._replace(valid=jnp.ones_like(state.valid)))
    # One program for whatever happens to a frame: this is what takes time to compile.
    body = functools.partial(_step, clips)
    body = jax.checkpoint(body) if config.remat else body
    _, (totals, terms, ious) = lax.scan(body, state, _events(clips.plan, len(clips.trunk), key))
    terms = {name.replace("click_", "track_"): value.sum() for name, value in terms.items()}
    terms["prompted_iou"] = ious[0]
    if len(clips.trunk) > 1:
        terms |= {"tracked_iou": ious[2:].mean(), "last_iou": ious[-1]}
    return totals.sum(), terms


def _step(
    clips: Clips, state: TrackState, event: Event
) -> tuple[TrackState, tuple[Float[Array, ""], Terms, Float[Array, ""]]]:
    """:func:`happen`, unless nothing does."""
    return step_if(event.happens, functools.partial(happen, clips), state, event)


def _prepare(
    module: Sam3,
    params: dict,
    batch: ClipBatch,
    config: TrackerTrainingConfig,
    key: PRNGKeyArray,
    replicas: int,
) -> tuple[Clips, PRNGKeyArray]:
    """The frames' maps and what is going to happen, and a key for the rest."""
    frames, model, prompting = batch.frames.shape[1], module.config, config.prompting

    def encode(pixels: Array) -> Array:
        return module.apply({"params": params}, normalize(pixels), method="encode_trunk")

    # One frame of all clips at a time.
    trunk = lax.map(encode, rearrange(batch.frames, "b t h w c -> t b h w c"))
    plan, key = jax.random.split(key)
    height, width = trunk.shape[2:4]
    rules = Rules(
        config.loss,
        replicas,
        batch.frames.shape[3],
        prompting.corrections,
        prompting.on_object,
        (4 * height, 4 * width),
    )
    clips = Clips(
        module,
        params,
        Setup(module, training_rules(model.memory.num_maps, frames)),
        rules,
        prompting,
        lax.stop_gradient(trunk),
        rearrange(batch.masks, "b m t h w -> t (b m) h w"),
        rearrange(batch.known, "b m t -> t (b m)"),
        rearrange(batch.valid, "b m -> (b m)"),
        draw_plan(plan, batch.valid.size, frames, prompting),
        jnp.int32(config.told_frames or frames),
    )
    return clips, key


def _events(plan: Plan, frames: int, key: PRNGKeyArray) -> Event:
    """Prompted frames come first, whatever their number, as upstream; then the others in order."""
    if frames == 1:
        index, prompted, happens = jnp.zeros(1, jnp.int32), jnp.array([True]), jnp.array([True])
    else:
        rest = jnp.arange(1, frames, dtype=jnp.int32)
        index = jnp.concatenate([jnp.stack([jnp.int32(0), plan.second]), rest])
        prompted = jnp.arange(frames + 1) < 2
        happens = (jnp.arange(frames + 1) != 1) | (plan.deed == PROMPT)
    dropout, user = jax.random.split(key)
    return Event(
        index,
        prompted,
        happens,
        jax.random.split(dropout, len(index)),
        jax.random.split(user, len(index)),
    )

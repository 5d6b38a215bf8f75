"""What one bucket of objects remembers: a pytree of fixed size, and the edits of it.

An object is a slot. Every array's first axis is the slot, so buckets split over a mesh as batches
do. Objects come and go by edits of masks and frame numbers: shapes never change, so the same few
programs (``tracking.narrow``) serve any of them. More objects than a bucket holds are more buckets,
each handled by one more call.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sam3_jax.config import ModelConfig
from sam3_jax.tracking.config import TrackerConfig, check
from sam3_jax.tracking.memories import (
    EMPTY,
    Frame,
    place_conditioning,
    place_tracked,
)


class TrackState(NamedTuple):
    """Memory of S objects: C prompted frames, then M tracked ones as maps, P as pointers.

    ``*_frames`` number the frames, -1 where nothing is held; ``*_good`` marks those that later
    frames may find by walking back. ``group`` numbers what upstream calls a tracker state: objects
    whose masks do not overlap on prompted frames and, with selection "session", share a score.
    """

    valid: Bool[Array, " s"]
    group: Int[Array, " s"]
    maps: Float[Array, "s cm h w c"]
    map_frames: Int[Array, "s cm"]
    map_good: Bool[Array, "s cm"]
    pointers: Float[Array, "s cp d"]
    pointer_frames: Int[Array, "s cp"]
    pointer_good: Bool[Array, "s cp"]


class StateBytes(NamedTuple):
    """Size of tracking's memory in bytes; ``session`` is the sum over all its buckets."""

    per_object: int
    per_bucket: int
    session: int


def empty_state(
    config: TrackerConfig,
    model: ModelConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    slots: int | None = None,
    grid: tuple[int, int] | None = None,
) -> TrackState:
    """A bucket without objects.

    Args:
      dtype: of the maps, the compute dtype; pointers are float32.
      slots: objects it has room for (default: ``config.bucket_size``).
      grid: (height, width) of the coarsest feature map (default: of square frames of the model's
        size).

    Raises:
      ValueError: for a configuration that cannot work.
    """
    check(config, model.memory.num_maps)
    slots = config.bucket_size if slots is None else slots
    side = model.image_size // model.vision.patch_size
    grid = (side, side) if grid is None else grid
    maps = config.stored_conditioning + config.recent_maps
    pointers = config.stored_conditioning + config.recent_pointers
    return TrackState(
        jnp.zeros(slots, bool),
        jnp.zeros(slots, jnp.int32),
        jnp.zeros((slots, maps, *grid, model.memory.dim), dtype),
        jnp.full((slots, maps), EMPTY, jnp.int32),
        jnp.zeros((slots, maps), bool),
        jnp.zeros((slots, pointers, model.dim), jnp.float32),
        jnp.full((slots, pointers), EMPTY, jnp.int32),
        jnp.zeros((slots, pointers), bool),
    )


def state_bytes(
    config: TrackerConfig,
    model: ModelConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    objects: int = 1,
    slots: int | None = None,
    grid: tuple[int, int] | None = None,
) -> StateBytes:
    """Exact size of the state of a session with ``objects`` objects, however long its video.

    Arguments as :func:`empty_state`. Frame features and outputs are not part of it.
    """
    slots = config.bucket_size if slots is None else slots
    make = functools.partial(empty_state, config, model, dtype=dtype, slots=slots, grid=grid)
    bucket = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(make)))
    return StateBytes(bucket // slots, bucket, bucket * math.ceil(objects / slots))


def add_objects(
    state: TrackState, slots: Bool[Array, " s"], group: Int[Array, ""] | int = 0
) -> TrackState:
    """Gives ``slots`` to new objects of one group; whatever they remembered is forgotten."""
    state = _forget(state, slots[:, None], slots[:, None])
    return state._replace(
        valid=state.valid | slots, group=jnp.where(slots, group, state.group).astype(jnp.int32)
    )


def remove_objects(state: TrackState, slots: Bool[Array, " s"]) -> TrackState:
    """Frees slots."""
    return _forget(state, slots[:, None], slots[:, None])._replace(valid=state.valid & ~slots)


def forget_tracked(
    state: TrackState, slots: Bool[Array, " s"], config: TrackerConfig
) -> TrackState:
    """Keeps of these objects the prompted frames alone: to track anew, or the other way."""
    count = config.stored_conditioning
    tracked = [jnp.arange(x.shape[1]) >= count for x in (state.map_frames, state.pointer_frames)]
    return _forget(state, *(slots[:, None] & x for x in tracked))


def forget_conditioning(
    state: TrackState,
    slots: Bool[Array, " s"],
    first: Int[Array, ""] | int,
    last: Int[Array, ""] | int,
    config: TrackerConfig,
) -> TrackState:
    """Drops the prompted frames ``first``..``last`` of these objects, as when one is undone.

    Upstream keeps them as tracked frames without a score, which selection never reads (but right
    after them) and plain distance does.
    """

    def dropped(frames: Int[Array, "s n"]) -> Bool[Array, "s n"]:
        prompted = jnp.arange(frames.shape[1]) < config.stored_conditioning
        return slots[:, None] & prompted & (frames >= first) & (frames <= last)

    return _forget(state, dropped(state.map_frames), dropped(state.pointer_frames))


def has_conditioning(state: TrackState, frame: Frame, config: TrackerConfig) -> Bool[Array, " s"]:
    """Whether each object was prompted on this frame."""
    return (state.map_frames[:, : config.stored_conditioning] == frame.index).any(axis=1)


def _forget(
    state: TrackState, maps: Bool[Array, "#s #m"], pointers: Bool[Array, "#s #p"]
) -> TrackState:
    """Empties places; their values stay and are never read."""
    return state._replace(
        map_frames=jnp.where(maps, EMPTY, state.map_frames),
        map_good=state.map_good & ~maps,
        pointer_frames=jnp.where(pointers, EMPTY, state.pointer_frames),
        pointer_good=state.pointer_good & ~pointers,
    )


def remember(
    state: TrackState,
    frame: Frame,
    maps: Float[Array, "s h w c"],
    pointers: Float[Array, "s d"],
    scores: Float[Array, " s"],
    write: Bool[Array, " s"],
    conditioning: Bool[Array, " s"],
    config: TrackerConfig,
) -> TrackState:
    """Stores what the objects of ``write`` look like on a frame.

    Args:
      scores: of the frame, for memory selection.
      conditioning: the frame becomes a prompted one of these objects. One that already was, and is
        stored again without this, stays so: its map is replaced, its pointer is not.
    """
    count, stride = config.stored_conditioning, config.temporal_stride
    again = has_conditioning(state, frame, config)
    prompted = conditioning | again
    # What was tracked on a frame gives way to what was prompted there.
    gone = (write & prompted)[:, None]
    state = _forget(
        state,
        gone & (jnp.arange(state.map_frames.shape[1]) >= count) & (state.map_frames == frame.index),
        gone
        & (jnp.arange(state.pointer_frames.shape[1]) >= count)
        & (state.pointer_frames == frame.index),
    )
    by_score = config.selection != "none"
    good = scores > config.score_threshold
    good_map = good if by_score else jnp.broadcast_to(frame.index % stride == 0, good.shape)
    good_pointer = good if by_score else jnp.ones_like(good)
    phases = stride if by_score else 1

    def place(frames: Int[Array, "s n"], found: Bool[Array, "s n"]) -> Int[Array, " s"]:
        tracked = place_tracked(frames[:, count:], found[:, count:], frame, phases) + count
        return jnp.where(prompted, place_conditioning(frames[:, :count], frame), tracked)

    def put(values: Array, index: Int[Array, " s"], new: Array) -> Array:
        # A batch of small scatters stays on the slots' own devices, one large one does not.
        return jax.vmap(lambda v, i, x: v.at[i].set(x, mode="drop"))(
            values, index, new.astype(values.dtype)
        )

    map_at = jnp.where(write, place(state.map_frames, state.map_good), state.map_frames.shape[1])
    pointer_at = place(state.pointer_frames, state.pointer_good)
    keep_pointer = again & ~conditioning
    pointer_at = jnp.where(write & ~keep_pointer, pointer_at, state.pointer_frames.shape[1])
    number = jnp.broadcast_to(frame.index, write.shape)
    return state._replace(
        maps=put(state.maps, map_at, maps),
        map_frames=put(state.map_frames, map_at, number),
        map_good=put(state.map_good, map_at, good_map & ~prompted),
        pointers=put(state.pointers, pointer_at, pointers),
        pointer_frames=put(state.pointer_frames, pointer_at, number),
        pointer_good=put(state.pointer_good, pointer_at, good_pointer & ~prompted),
    )

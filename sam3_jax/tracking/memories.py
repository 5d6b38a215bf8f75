"""Which frames an object remembers, and which of them a frame reads: index arithmetic only.

Upstream: ``select_closest_cond_frames``, ``frame_filter`` and
``_prepare_memory_conditioned_features`` (``sam3/model/sam3_tracker_base.py``), which walk over
dictionaries that grow with every frame. Here an object owns a store of fixed length: first
``stored_conditioning`` prompted frames, then the tracked ones. A function of frame numbers says
what is read, another what gives way to a new frame.

With selection, 6 tracked maps and 16 pointers (strides multiply them) give what upstream's
unbounded dictionaries give. Frame t reads t-1, whatever its score, and before it the newest good
frames, 5 maps and at most 14 pointers: the last frame and the 5 (15, as their number sets how many
are read) newest good ones before it are all that any later frame can ask for. Without selection the
same holds for the last frames, or every ``temporal_stride``-th.

Where the result can differ from upstream's:

- more prompted frames than ``stored_conditioning``: upstream keeps all of them and reads the
  nearest. Equal while prompts come in the order of tracking, but that without selection an old
  prompted frame within the last 15 is still read as an ordinary one;
- after a change of direction or a jump, upstream still finds what an earlier pass left on the far
  side. Here that was overwritten: start from a snapshot of the state, or with the tracked frames
  forgotten;
- a good score is decided when the frame is stored; upstream computes the score of a session anew
  when one of its objects is removed, and makes an ordinary frame of one that was conditioning
  because that object was renewed there;
- equally distant prompted frames beyond the nearest two: the one stored earlier goes first, which
  after a replacement need not be the one prompted earlier.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from sam3_jax.tracking.config import TrackerConfig

EMPTY = -1  # frame number of a place that holds nothing
ENDLESS = 1 << 30  # number of frames of a stream
_LEVEL = 1 << 24  # reasons to give way outweigh distances


class Frame(NamedTuple):
    """Which frame is looked at: all traced, so that no frame needs a program of its own."""

    index: Int[Array | np.ndarray, ""]
    total: Int[Array | np.ndarray, ""]  # frames of the video; ENDLESS for a stream
    backward: Bool[Array | np.ndarray, ""]  # tracking goes towards frame 0


def frame_at(index: int, total: int | None = None, *, backward: bool = False) -> Frame:
    """Frame number ``index`` of ``total`` (None: of a stream)."""
    total = ENDLESS if total is None else total
    return Frame(np.asarray(index, np.int32), np.asarray(total, np.int32), np.asarray(backward))


def behind(frames: Int[Array, "*n"], frame: Frame) -> Int[Array, "*n"]:
    """How many frames ago each was tracked, or would have been; empty places: -1."""
    distance = jnp.where(frame.backward, frames - frame.index, frame.index - frames)
    return jnp.where(frames == EMPTY, -1, distance)


def pointer_limit(frame: Frame, config: TrackerConfig) -> Int[Array, ""]:
    """Pointers that count as the past: 16, or the video's frames if it has less."""
    return jnp.minimum(frame.total, config.max_pointers)


def select_conditioning(frames: Int[Array, "s c"], frame: Frame, limit: int) -> Bool[Array, "s c"]:
    """The prompted frames that are read: all up to ``limit``; of more, the nearest before and the
    nearest at or after this frame, then whichever are closest.
    """
    if frames.shape[1] <= limit:
        return frames != EMPTY
    held = frames != EMPTY
    distance = jnp.abs(frames - frame.index)
    far = jnp.iinfo(jnp.int32).max

    def nearest(among: Bool[Array, "s c"]) -> Bool[Array, "s c"]:
        first = jnp.argmin(jnp.where(among, distance, far), axis=1)
        return among & (jnp.arange(frames.shape[1]) == first[:, None])

    before = nearest(held & (frames < frame.index))
    after = nearest(held & (frames >= frame.index))
    order = jnp.where(held, distance, far - 1)
    order = jnp.where(after, -1, order)
    order = jnp.where(before, -2, order)
    place = jnp.argsort(jnp.argsort(order, axis=1, stable=True), axis=1)
    return held & (place < limit)


def _walk(
    frames: Int[Array, "s r"], good: Bool[Array, "s r"], frame: Frame, config: TrackerConfig
) -> tuple[Int[Array, "s r"], Int[Array, " s"]]:
    """Memory selection: rank of each frame among those that count, 1 the newest, and their number.

    Walks back over good frames at the stride until all but one of ``pointer_limit`` are found; the
    last frame takes rank 1 in any case, even where nothing of it is stored. Forwards, frame 0 is
    never looked at. Rank 0: does not count.
    """
    distance = behind(frames, frame)
    walked = good & (distance >= 1) & ((distance - 1) % config.temporal_stride == 0)
    walked &= frame.backward | (frames != 0)
    nearer = walked[:, None, :] & (distance[:, None, :] < distance[:, :, None])
    newer = nearer.sum(axis=2)
    walked &= newer < pointer_limit(frame, config) - 1
    last = distance == 1
    extra = ~(walked & last).any(axis=1)
    rank = jnp.where(walked, newer + 1 + extra[:, None], 0)
    rank = jnp.where(last & ~walked, 1, rank)
    return rank, walked.sum(axis=1) + extra


def _strided(frames: Int[Array, "s m"], frame: Frame, stride: int) -> Int[Array, "s m"]:
    """Without selection: 1 for the last frame, then 2, 3.. for every ``stride``-th before it."""
    t = frame.index
    base = jnp.where(frame.backward, -(-(t + 2) // stride), (t - 2) // stride) * stride
    steps = jnp.where(frame.backward, frames - base, base - frames)
    on = (frames != EMPTY) & (steps >= 0) & (steps % stride == 0)
    return jnp.where(behind(frames, frame) == 1, 1, jnp.where(on, 2 + steps // stride, 0))


def recall_maps(
    frames: Int[Array, "s m"], good: Bool[Array, "s m"], frame: Frame, config: TrackerConfig
) -> Int[Array, "s m"]:
    """What a frame reads of the stored maps.

    Args:
      frames: number of the frame in each place, the first ``stored_conditioning`` prompted ones.
      good: whether the frame may be found by walking back.

    Returns 0 where a map is not read, 1.. by distance (or rank) where it is read as a tracked one,
    ``num_maps`` where it is read as a prompted one.
    """
    count = config.stored_conditioning
    chosen = select_conditioning(frames[:, :count], frame, config.max_conditioning)
    if config.selection == "none":
        # Prompted frames that were not chosen are as good as tracked ones.
        rank = _strided(frames, frame, config.temporal_stride)
        prompted, rank = rank[:, :count], rank[:, count:]
    else:
        rank, _ = _walk(frames[:, count:], good[:, count:], frame, config)
        prompted = jnp.zeros_like(frames[:, :count])
    rank = jnp.concatenate([prompted, rank], axis=1)
    rank = jnp.where(rank < config.num_maps, rank, 0)
    return rank.at[:, :count].set(jnp.where(chosen, config.num_maps, rank[:, :count]))


def recall_pointers(
    frames: Int[Array, "s p"], good: Bool[Array, "s p"], frame: Frame, config: TrackerConfig
) -> tuple[Float[Array, "s p"], Bool[Array, "s p"]]:
    """Temporal position of the stored pointers, 1 the furthest, and which of them are read.

    Prompted frames give theirs only once tracking has passed them. Arguments as
    :func:`recall_maps`.
    """
    count = config.stored_conditioning
    limit = pointer_limit(frame, config)
    chosen = select_conditioning(frames[:, :count], frame, config.max_conditioning)
    distance = behind(frames, frame)
    if config.selection == "none":
        position, most = distance, jnp.full(len(frames), limit - 1)
    else:
        rank, found = _walk(frames[:, count:], good[:, count:], frame, config)
        # The oldest of the frames that count lends its map, never its pointer.
        most = jnp.minimum(found - 1, limit - 1)
        position = jnp.concatenate([jnp.zeros_like(frames[:, :count]), rank], axis=1)
    read = (position >= 1) & (position <= most[:, None])
    prompted = jnp.where(chosen, distance[:, :count] >= 0, read[:, :count])
    read = read.at[:, :count].set(prompted)
    own = jnp.where(chosen, distance[:, :count], position[:, :count])
    position = position.at[:, :count].set(own)
    return position / jnp.maximum(limit - 1, 1).astype(jnp.float32), read


def place_conditioning(frames: Int[Array, "s c"], frame: Frame) -> Int[Array, " s"]:
    """Where a newly prompted frame goes: over itself, into a free place, over the furthest."""
    distance = jnp.abs(frames - frame.index)
    reason = jnp.where(frames == frame.index, 2, jnp.where(frames == EMPTY, 1, 0))
    furthest = jnp.where(reason == 0, jnp.minimum(distance, _LEVEL - 1), 0)
    return jnp.argmax(reason * _LEVEL + furthest, axis=1)


def place_tracked(
    frames: Int[Array, "s r"], good: Bool[Array, "s r"], frame: Frame, stride: int
) -> Int[Array, " s"]:
    """Where a newly tracked frame goes.

    Over itself, into a free place, over a frame on the far side of it, over one that is not good;
    else over the one with the most good frames after it, counted by their phase in the stride.
    """
    distance = behind(frames, frame)
    same_phase = (frames[:, :, None] - frames[:, None, :]) % stride == 0
    nearer = distance[:, None, :] < distance[:, :, None]
    after = (same_phase & nearer & good[:, None, :]).sum(axis=2)
    reason = jnp.where(good, 0, 1)
    reason = jnp.where(distance < 0, 2, reason)
    reason = jnp.where(frames == EMPTY, 3, reason)
    reason = jnp.where(frames == frame.index, 4, reason)
    key = jnp.where(reason == 0, after, jnp.minimum(jnp.abs(distance), _LEVEL - 1))
    return lax.stop_gradient(jnp.argmax(reason * _LEVEL + key, axis=1))


def presence(object_logits: Float[Array, " s"]) -> Float[Array, " s"]:
    """Probability above one half, rescaled to 0..1."""
    return jnp.maximum(2.0 / (1.0 + jnp.exp(-object_logits)) - 1.0, 0.0)


def memory_score(object_logits: Float[Array, " s"], iou: Float[Array, " s"]) -> Float[Array, " s"]:
    """How well a frame shows an object: its presence times its IoU."""
    return presence(object_logits) * iou


def group_score(
    object_logits: Float[Array, " s"],
    iou: Float[Array, " s"],
    group: Int[Array, " s"],
    valid: Bool[Array, " s"],
) -> Float[Array, " s"]:
    """How well a frame shows the valid objects of each object's group, 0 for others.

    The mean presence times the mean IoU: upstream (``cal_mem_score``) multiplies an array (b, 1) by
    one of shape (b,) before it takes the mean.
    """
    same = (group[:, None] == group[None, :]) & valid[None, :] & valid[:, None]
    count = jnp.maximum(same.sum(1), 1)

    def mean(values: Float[Array, " s"]) -> Float[Array, " s"]:
        return jnp.where(same, values[None, :], 0.0).sum(1) / count

    return mean(presence(object_logits)) * mean(iou)

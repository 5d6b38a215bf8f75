"""The state of a bucket: its size, its edits, masks on their way into it, prompts packed for it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3_jax import config
from sam3_jax.config import from_dict, to_dict
from sam3_jax.tracking.config import NAMED, TrackerConfig
from sam3_jax.tracking.masks import mask_prompt, memory_masks, non_overlapping
from sam3_jax.tracking.memories import EMPTY, frame_at
from sam3_jax.tracking.programs import Programs
from sam3_jax.tracking.prompts import ObjectClicks, pack_clicks
from sam3_jax.tracking.state import (
    TrackState,
    add_objects,
    empty_state,
    forget_conditioning,
    forget_tracked,
    has_conditioning,
    remember,
    remove_objects,
    state_bytes,
)
from sam3_jax.tracking.step import recall

MODEL = config.tiny()
CONFIG = TrackerConfig()
SLOTS = 4


def only(*slots: int) -> jax.Array:
    return jnp.asarray(np.isin(np.arange(SLOTS), slots))


@pytest.fixture(scope="module")
def store():
    """Stores frames whose maps and pointers hold a value; prompted in some slots."""
    write = jax.jit(functools.partial(remember, config=CONFIG))

    def run(state: TrackState, frame: int, value: float, slots: np.ndarray, prompted: np.ndarray):
        maps = np.full((SLOTS, 1, 1, MODEL.memory.dim), value, np.float32)
        pointers = np.full((SLOTS, MODEL.dim), value, np.float32)
        scores = np.full(SLOTS, 0.5, np.float32)
        return write(state, frame_at(frame), maps, pointers, scores, slots, prompted)

    return run


@pytest.fixture(scope="module")
def filled(store) -> TrackState:
    """Slots 0 and 2 are objects, prompted on frames 0 and 4, tracked on 1 to 3."""
    state = add_objects(empty_state(CONFIG, MODEL, slots=SLOTS, grid=(1, 1)), only(0, 2), 5)
    for t in range(5):
        state = store(state, t, t, only(0, 2), only(0, 2) & (t % 4 == 0))
    return state


def frames(state: TrackState, slot: int) -> tuple[list[int], list[int]]:
    """Prompted and tracked frames of a slot, by its maps; pointers must agree."""
    count = CONFIG.stored_conditioning
    held = [np.asarray(x)[slot] for x in (state.map_frames, state.pointer_frames)]
    lists = [[sorted(part[part != EMPTY]) for part in (x[:count], x[count:])] for x in held]
    assert lists[0] == lists[1]
    return lists[0][0], lists[0][1]


def test_bytes_of_the_released_size():
    """Ten maps and twenty pointers an object, to the byte; nothing depends on the video."""
    small = state_bytes(CONFIG, config.sam3(), dtype=jnp.bfloat16, objects=200)
    maps, pointers = 10 * (72 * 72 * 64 * 2 + 4 + 1), 20 * (256 * 4 + 4 + 1)
    assert small.per_object == maps + pointers + 1 + 4 == 6_656_155
    assert small.per_bucket == 16 * small.per_object
    assert small.session == 13 * small.per_bucket  # 200 objects are 13 buckets
    for rules, slots in ((CONFIG, 3), (TrackerConfig(selection="none", temporal_stride=5), 1)):
        state = empty_state(rules, MODEL, slots=slots, grid=(3, 5))
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        assert size == state_bytes(rules, MODEL, slots=slots, grid=(3, 5)).per_bucket


def test_objects_come_and_go(filled):
    assert frames(filled, 0) == ([0, 4], [1, 2, 3])
    assert frames(filled, 1) == ([], [])
    assert filled.group.tolist() == [5, 0, 5, 0]
    state = add_objects(remove_objects(filled, only(0)), only(1, 3), 6)
    assert state.valid.tolist() == [False, True, True, True]
    assert frames(state, 0) == frames(state, 3) == ([], [])
    assert frames(state, 2) == ([0, 4], [1, 2, 3])
    assert add_objects(state, only(2)).group.tolist() == [5, 6, 0, 6]
    assert frames(add_objects(state, only(2)), 2) == ([], [])


def test_forgetting(filled):
    assert frames(forget_tracked(filled, only(0), CONFIG), 0) == ([0, 4], [])
    assert frames(forget_tracked(filled, only(0), CONFIG), 2) == ([0, 4], [1, 2, 3])
    state = forget_conditioning(filled, only(2), 1, 4, CONFIG)
    assert frames(state, 2) == ([0], [1, 2, 3])
    assert frames(state, 0) == ([0, 4], [1, 2, 3])


def test_a_frame_stored_again(filled, store):
    """Tracked frames become prompted ones; those keep their pointer unless prompted anew."""
    assert has_conditioning(filled, frame_at(4), CONFIG).tolist() == only(0, 2).tolist()
    state = store(filled, 2, 20, only(0), only(0))
    assert frames(state, 0) == ([0, 2, 4], [1, 3])
    assert frames(state, 2) == ([0, 4], [1, 2, 3])

    def of(state: TrackState, frame: int) -> tuple[float, float]:
        at = [list(np.asarray(x)[0]).index(frame) for x in (state.map_frames, state.pointer_frames)]
        maps, pointers = np.asarray(state.maps), np.asarray(state.pointers)
        return maps[0, at[0]].mean(), pointers[0, at[1]].mean()

    assert of(state, 2) == (20, 20)
    state = store(state, 4, 40, only(0), only())
    assert frames(state, 0) == ([0, 2, 4], [1, 3])
    assert of(state, 4) == (40, 4)
    assert of(store(state, 4, 41, only(0), only(0)), 4) == (41, 41)


def test_reading_fewer_maps(filled):
    """With a lower limit the maps that count are gathered; each keeps its row."""
    rules = dataclasses.replace(CONFIG, max_conditioning=1, num_maps=3)
    read = recall(filled, frame_at(5), rules)
    rows, values = np.asarray(read.rows), np.asarray(read.maps)[..., 0, 0, 0]
    assert rows.shape == values.shape == (SLOTS, 3)
    # Frame 4 was prompted and takes rank 1 as the last one too, so that 3 is the second.
    assert {(r, v) for r, v in zip(rows[0], values[0], strict=True) if r} == {(3, 4), (2, 3)}
    assert not rows[1].any()
    assert recall(filled, frame_at(5), CONFIG).maps is filled.maps  # all of them: not copied


def test_non_overlapping():
    """Within a group the highest logit keeps a pixel, of equals the first; others look on."""
    logits = np.zeros((5, 1, 4), np.float32)
    logits[0, 0], logits[1, 0] = [3, 1, 2, -20], [2, 4, 2, -30]
    logits[2, 0], logits[3, 0], logits[4, 0] = 9, 9, [8, 8, 8, 8]
    group, among = jnp.asarray([1, 1, 1, 2, 3]), jnp.asarray([True, True, False, True, True])
    out = np.asarray(non_overlapping(jnp.asarray(logits), group, among))
    np.testing.assert_array_equal(out[0, 0], [3, -10, 2, -20])
    np.testing.assert_array_equal(out[1, 0], [-10, 4, -10, -30])
    np.testing.assert_array_equal(out[2:], logits[2:])
    rules = dataclasses.replace(CONFIG, non_overlapping_prompts=False)
    for rule, hard in ((CONFIG, [1, 0, 1, 0]), (rules, [1, 1, 1, 0])):
        out = np.asarray(memory_masks(jnp.asarray(logits), among, group, (1, 4), rule))
        np.testing.assert_allclose(out[0, 0], 20.0 * np.array(hard) - 10)
        np.testing.assert_allclose(out[2, 0], 20 / (1 + np.exp(-9.0)) - 10, rtol=1e-6)


def test_later_masks_win():
    masks = np.zeros((3, 8, 8), bool)
    masks[0, :, :5], masks[1, :, 3:], masks[2, 4:] = True, True, True
    given = mask_prompt(jnp.asarray(masks), jnp.asarray([2, 1, 0]), (2, 2))
    assert given.masks.shape == (3, 32, 32)
    assert given.logits.shape == (3, 8, 8)
    hard = np.asarray(given.logits) > 0
    np.testing.assert_array_equal(hard[0], masks[0])
    np.testing.assert_array_equal(hard[1], masks[1] & ~masks[0])
    assert not hard[2].any()  # all of it is covered by the others
    assert (np.asarray(given.masks)[2] > 0).any()


def test_packed_clicks():
    xy = np.arange(40, dtype=np.float32).reshape(20, 2)
    many = ObjectClicks(xy, np.arange(20) % 2)
    few = ObjectClicks(xy[:2], np.array([2, 3]), np.full((4, 4), 7.0))
    packed = pack_clicks({0: many, 2: few}, 3, (4, 4))
    np.testing.assert_array_equal(packed.points[0], np.concatenate([xy[:8], xy[-8:]]))
    assert packed.labels[2].tolist() == [2, 3] + [-2] * 14
    assert (packed.labels[1] == -2).all()
    assert packed.has_mask.tolist() == [False, False, True]
    assert packed.mask_input[2].mean() == 7
    with pytest.raises(ValueError, match="slot 3: this bucket has slots 0 to 2"):
        pack_clicks({3: few}, 3, (4, 4))
    with pytest.raises(ValueError, match="slot 1: points of shape"):
        pack_clicks({1: ObjectClicks(xy, np.array([1]))}, 3, (4, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_maps": 8}, "num_maps=8: the model was trained with 7"),
        ({"selection": "mean"}, "selection='mean': choose one of"),
        ({"temporal_stride": 0}, "temporal_stride=0: must be at least 1"),
        ({"max_pointers": 1}, "max_pointers=1: must be at least 2"),
    ],
)
def test_bad_configurations(changes, message):
    rules = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(ValueError, match=message):
        empty_state(rules, MODEL)
    with pytest.raises(ValueError, match=message):
        Programs(MODEL, rules)


def test_named_configurations():
    for make in NAMED.values():
        assert from_dict(to_dict(make()), TrackerConfig) == make()
    assert NAMED["sam3"]().selection == "session"

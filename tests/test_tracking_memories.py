"""Which frames are read, from a store of fixed length, against upstream's walk over all frames."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sam3_jax import config
from sam3_jax.tracking.config import TrackerConfig
from sam3_jax.tracking.memories import (
    EMPTY,
    ENDLESS,
    frame_at,
    group_score,
    memory_score,
    place_conditioning,
    place_tracked,
    recall_maps,
    recall_pointers,
    select_conditioning,
)
from sam3_jax.tracking.state import TrackState, add_objects, empty_state, remember
from upstream_memory import Rules, attended, choose_conditioning

MODEL = config.tiny()
SLOTS = 6


class History:
    """Six objects in our store, and in upstream's dictionaries."""

    def __init__(self, rules: TrackerConfig, total: int | None, *, backward: bool) -> None:
        self.config, self.total, self.backward = rules, total, backward
        self.rules = Rules(
            rules.selection, total or ENDLESS, rules.temporal_stride, rules.score_threshold,
            rules.num_maps, rules.max_pointers, rules.max_conditioning,
        )  # fmt: skip
        state = empty_state(rules, MODEL, slots=SLOTS, grid=(1, 1))
        self.state = add_objects(state, jnp.ones(SLOTS, bool))
        self.prompted: list[list[int]] = [[] for _ in range(SLOTS)]
        self.scores: list[dict[int, float]] = [{} for _ in range(SLOTS)]
        self._remember, self._recall = programs(rules.selection, rules.temporal_stride)

    def store(
        self, frame: int, scores: np.ndarray, write: np.ndarray, prompted: np.ndarray
    ) -> None:
        """Maps and pointers hold their frame's number."""
        now = frame_at(frame, self.total, backward=self.backward)
        maps = jnp.full((SLOTS, 1, 1, MODEL.memory.dim), float(frame))
        pointers = jnp.full((SLOTS, MODEL.dim), float(frame))
        self.state = self._remember(
            self.state, now, maps, pointers, jnp.asarray(scores, jnp.float32), write, prompted
        )
        for i in np.flatnonzero(write):
            if prompted[i]:
                self.prompted[i] += [frame] * (frame not in self.prompted[i])
                self.scores[i].pop(frame, None)
            elif frame not in self.prompted[i]:
                self.scores[i][frame] = float(scores[i])

    def check(self, frame: int) -> int:
        """Compares what a frame reads; how many pointers in all."""
        now = frame_at(frame, self.total, backward=self.backward)
        rank, times, mask = map(np.asarray, self._recall(self.state, now))
        limit = min(self.rules.total, self.rules.pointers) - 1
        stored_maps = np.asarray(self.state.maps)[:, :, 0, 0, 0]
        stored_pointers = np.asarray(self.state.pointers)[:, :, 0]
        count = 0
        for i in range(SLOTS):
            maps, pointers = attended(
                frame, self.prompted[i], self.scores[i], self.rules, backward=self.backward
            )
            offset = np.where(rank[i] == self.config.num_maps, 0, rank[i])
            read = rank[i] > 0
            assert set(zip(stored_maps[i][read], offset[read], strict=True)) == set(maps), (
                f"{frame=} {i=}"
            )
            assert read.sum() == len(maps)
            position = np.rint(times[i] * max(limit, 1))
            actual = set(zip(stored_pointers[i][mask[i]], position[mask[i]], strict=True))
            assert actual == set(pointers), (frame, i)
            count += len(pointers)
        return count


@functools.cache
def programs(selection: str, stride: int) -> tuple[Callable, Callable]:
    """One pair for all histories under the same rules."""
    rules = TrackerConfig(selection=selection, temporal_stride=stride)
    return tuple(jax.jit(functools.partial(f, config=rules)) for f in (remember, _recall))


def _recall(state: TrackState, now, *, config: TrackerConfig) -> tuple:
    rank = recall_maps(state.map_frames, state.map_good, now, config)
    return (rank, *recall_pointers(state.pointer_frames, state.pointer_good, now, config))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("selection", ["object", "none"])
def test_random_histories(rng, selection, stride):
    """Both ways, some prompted frames ahead, some frames bad, some missing, some corrected."""
    rules = TrackerConfig(selection=selection, temporal_stride=stride)
    for total, backward in ((4, False), (40, False), (None, False), (5, True), (40, True)):
        history = History(rules, total, backward=backward)
        length = total or 40
        nobody = np.zeros(SLOTS, bool)
        for frame in rng.choice(length, 2, replace=False):
            some = rng.random(SLOTS) < 0.5
            history.store(int(frame), np.ones(SLOTS), some, some)
        rate = np.array([0.0, 0.1, 0.3, 0.6, 0.9, 1.0])  # of bad frames, by object
        most = 0
        for t in range(length)[:: -1 if backward else 1]:
            most = max(most, history.check(t))
            scores = np.where(rng.random(SLOTS) < rate, rng.choice([0.0, 0.01]), 0.5)
            history.store(t, scores, rng.random(SLOTS) < 0.9, nobody)
            # Of four prompted frames that are kept two were given at the start.
            fixed = (rng.random(SLOTS) < 0.04) & (np.array(list(map(len, history.prompted))) < 4)
            history.store(t, scores, fixed, fixed)
        assert most > (4 * SLOTS if length > 16 else 0)


def test_many_prompts_in_order(rng):
    """More prompted frames than are kept: with selection the newest four are what is read."""
    history = History(TrackerConfig(), None, backward=False)
    for t in range(60):
        history.check(t)
        every = np.full(SLOTS, t % 8 == 0)
        history.store(t, rng.choice([0.0, 0.7], SLOTS), np.ones(SLOTS, bool), every)


def test_select_conditioning(rng):
    """More are kept than read."""
    frames = np.stack([rng.choice(40, 6, replace=False) for _ in range(SLOTS)]).astype(np.int32)
    frames[0, 4:] = EMPTY
    frames[1] = EMPTY
    for t in range(0, 40, 3):
        chosen = np.asarray(select_conditioning(jnp.asarray(frames), frame_at(t), 4))
        for row, mask in zip(frames, chosen, strict=True):
            held = [int(x) for x in row if x != EMPTY]
            assert sorted(row[mask]) == sorted(choose_conditioning(t, held, 4))


def test_places():
    """Who gives way, in the order of reasons."""

    def tracked(frames: list[int], good: list[int], now: int, *, backward: bool = False) -> int:
        at = frame_at(now, backward=backward)
        rows = jnp.asarray([frames]), jnp.asarray([good], bool)
        return int(place_tracked(*rows, at, 1)[0])

    assert tracked([3, 7, 5], [1, 1, 1], 7) == 1  # itself
    assert tracked([3, EMPTY, 9], [1, 0, 1], 8) == 1  # a free place
    assert tracked([3, 4, 9], [1, 0, 1], 8) == 2  # the far side
    assert tracked([3, 4, 9], [1, 0, 1], 2, backward=True) == 1  # a bad one
    assert tracked([3, 4, 5], [1, 1, 1], 6) == 0  # the oldest
    assert tracked([3, 4, 5], [1, 1, 1], 2, backward=True) == 2
    frames = jnp.asarray([[0, 16, EMPTY, 5], [0, 16, 32, 48]])
    assert place_conditioning(frames, frame_at(64)).tolist() == [2, 0]
    assert place_conditioning(frames, frame_at(16)).tolist() == [1, 1]


def test_scores():
    logits, iou = jnp.asarray([2.0, -1.0, 0.5, 3.0]), jnp.asarray([0.8, 0.9, 0.5, 1.0])
    scores = memory_score(logits, iou)
    expected = [0.8 * (2 / (1 + np.exp(-2.0)) - 1), 0, 0.5 * (2 / (1 + np.exp(-0.5)) - 1)]
    np.testing.assert_allclose(scores[:3], expected, rtol=1e-6)
    group, valid = jnp.asarray([4, 4, 1, 4]), jnp.asarray([True, True, True, False])
    both = (2 / (1 + np.exp(-2.0)) - 1) / 2 * (0.8 + 0.9) / 2
    found = group_score(logits, iou, group, valid)
    np.testing.assert_allclose(found, [both, both, expected[2], 0], rtol=1e-6)


def test_scores_of_a_group_as_upstream_multiplies_them():
    """One that is nearly gone and one that is: neither the mean of scores (.014) nor one's own."""
    presence, iou = torch.tensor([[0.04], [0.0]]), torch.tensor([0.7, 0.1])
    expected = float((presence * iou).mean())
    assert expected == pytest.approx(0.008)
    logits = jnp.asarray([np.log(1.04 / 0.96), -3.0])
    one = jnp.zeros(2, jnp.int32)
    found = group_score(logits, jnp.asarray(iou.numpy()), one, jnp.ones(2, bool))
    np.testing.assert_allclose(found, [expected] * 2, rtol=1e-5)

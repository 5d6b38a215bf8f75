"""Objects of one group in several buckets: what they have in common spans all of them.

The reference is one bucket that holds them all, which parity tests compare with torch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny_predictor
import video_session
from sam3_jax.models.tracker import Tracked
from sam3_jax.tracking.config import TrackerConfig
from sam3_jax.tracking.memories import frame_at
from sam3_jax.tracking.narrow import read_limits, widths
from sam3_jax.tracking.programs import Programs
from sam3_jax.video.buckets import Buckets

OBJECTS, FRAMES = 4, 4
ALL = np.arange(OBJECTS)


def buckets_of(size: int) -> Buckets:
    """Four objects of one group, whose scores are those of the group."""
    config = TrackerConfig(selection="session", bucket_size=size)
    made = Buckets(Programs(tiny_predictor.config(), config), video_session.params())
    made.reserve(OBJECTS)
    made.add(ALL, np.zeros(OBJECTS, np.int32))
    return made


@pytest.fixture(scope="module")
def pyramids() -> list[tuple]:
    rng = np.random.default_rng(4)
    shapes = (1, 32, 32, 4), (1, 16, 16, 8), (1, 8, 8, 32)
    frames = [tuple(rng.standard_normal(s, np.float32) for s in shapes) for _ in range(FRAMES)]
    return jax.device_put(frames)


@pytest.fixture(scope="module")
def said() -> Tracked:
    """Prompts whose masks overlap: discs around neighbouring centres, steep and flat."""
    y, x = np.mgrid[:32, :32].astype(np.float32)
    radius = [np.hypot(y - 12 - 3 * i, x - 16) for i in range(OBJECTS)]
    masks = np.stack([(9 - r) * (1 + i % 2) for i, r in enumerate(radius)])
    ones = np.ones(OBJECTS, np.float32)
    pointers = np.random.default_rng(5).standard_normal((OBJECTS, 32), np.float32)
    return Tracked(masks, ones, 5 * ones, pointers)


@pytest.fixture(scope="module")
def one() -> Buckets:
    """A bucket that holds all."""
    return buckets_of(OBJECTS)


def parts(buckets: Buckets, said: Tracked) -> dict[int, Tracked]:
    """By bucket."""
    size = buckets.size
    cut = [slice(i, i + size) for i in range(0, OBJECTS, size)]
    return {i: Tracked(*(value[here] for value in said)) for i, here in enumerate(cut)}


def follow(buckets: Buckets, pyramids: list[tuple], said: Tracked) -> list[Tracked]:
    """What is found on every frame after the first, by object."""
    given = parts(buckets, said)
    write = {i: np.ones(buckets.size, bool) for i in given}
    total = 100
    buckets.prompt(pyramids[0], frame_at(0, total), given, write)
    out = []
    for t in range(1, FRAMES):
        found = jax.device_get(buckets.track(pyramids[t], frame_at(t, total)))
        out.append(Tracked(*(np.concatenate(x) for x in zip(*found, strict=True))))
    return out


def remembered(buckets: Buckets, field: str) -> np.ndarray:
    return np.concatenate([np.asarray(getattr(state, field)) for state in buckets.states])


@pytest.mark.slow
def test_company_does_not_depend_on_buckets(one, pyramids, said):
    many = buckets_of(OBJECTS // 2)
    expected, found = (follow(buckets, pyramids, said) for buckets in (one, many))
    assert len(many.states) == 2
    for a, b in zip(found, expected, strict=True):
        for name, x, y in zip(Tracked._fields, a, b, strict=True):
            # Batches of another size add in another order.
            spread = max(1.0, float(np.ptp(y)))
            np.testing.assert_allclose(x, y, atol=1e-4 * spread, err_msg=name)
    for field in ("map_frames", "map_good", "pointer_frames", "pointer_good"):
        np.testing.assert_array_equal(remembered(many, field), remembered(one, field), field)
    good = remembered(one, "map_good")
    assert (good == good[:1]).all(), "one score for all of a group"
    # Neither rule is idle here: without them, maps of prompts or scores would be others.
    alone = Buckets(many.programs, many.params)
    alone.reserve(OBJECTS)
    alone.add(ALL, np.zeros(OBJECTS, np.int32))
    for i, part in parts(alone, said).items():
        alone.prompt(pyramids[0], frame_at(0, 100), {i: part}, {i: np.ones(alone.size, bool)})
    prompted = [remembered(b, "maps")[:, 0] for b in (one, many, alone)]
    assert np.abs(prompted[0] - prompted[1]).max() < 1e-4 * np.ptp(prompted[0])
    assert np.abs(prompted[0] - prompted[2]).max() > 1e-2 * np.ptp(prompted[0])


def test_free_slots_are_not_looked_at(one, pyramids, said):
    """A program for the first slots gives, and remembers, what the one for all gives."""
    buckets = Buckets(one.programs, one.params)
    buckets.reserve(1)
    assert one.programs.widths == (1, 2, OBJECTS)
    buckets.add(np.array([0]), np.zeros(1, np.int32))
    first = np.arange(OBJECTS) == 0
    buckets.prompt(pyramids[0], frame_at(0, 100), {0: said}, {0: first})
    (state,) = buckets.states
    whole = jax.tree.map(jnp.copy, state)
    args = pyramids[1], frame_at(1, 100)
    narrow = one.programs.track(one.params, state, *args, slots=1)
    wide = one.programs.track(one.params, whole, *args)
    for a, b in zip(*map(jax.tree.leaves, (narrow, wide)), strict=True):
        # What free slots hold is never read. Batches of another size add in another order.
        a, b = np.asarray(a[0], np.float32), np.asarray(b[0], np.float32)
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, float(np.ptp(b))))
    for name in ("masks", "iou", "object_logits"):
        free = np.asarray(getattr(narrow[1], name))[1:]
        np.testing.assert_array_equal(free, np.asarray(getattr(wide[1], name))[1:])


def test_no_more_prompted_frames_are_read_than_there_are(one, pyramids, said):
    """The program that reads one gives, and remembers, what the one that reads all gives."""
    buckets = Buckets(one.programs, one.params)
    buckets.reserve(1)
    all_reads = one.programs.config.max_conditioning
    assert one.programs.reads == (1, all_reads)
    buckets.add(ALL, np.zeros(OBJECTS, np.int32))
    every = np.ones(OBJECTS, bool)
    buckets.prompt(pyramids[0], frame_at(0, 100), {0: said}, {0: every})
    args = pyramids[1], frame_at(1, 100)

    def tracked(reads: int) -> tuple:
        state = jax.tree.map(jnp.copy, buckets.states[0])
        return one.programs.track(one.params, state, *args, reads=reads)

    assert buckets._least(0)["reads"] == 1
    for a, b in zip(*map(jax.tree.leaves, (tracked(1), tracked(all_reads))), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(np.ptp(b))))

    buckets.prompt(pyramids[2], frame_at(2, 100), {0: said}, {0: every})
    assert buckets._least(0)["reads"] == all_reads
    few, many = (np.asarray(tracked(reads)[1].masks) for reads in (1, all_reads))
    assert np.abs(few - many).max() > 1e-3 * np.ptp(many), "the second one tells something"
    packed = buckets.pack(ALL)
    buckets.forget_conditioning(ALL, 2, 2)
    assert buckets._least(0)["reads"] == 1
    buckets.unpack(packed)
    assert buckets._least(0)["reads"] == all_reads
    buckets.remove(ALL, np.zeros(OBJECTS, bool))
    assert buckets._least(0)["reads"] == 1
    assert [one.programs.reads_for(n) for n in (0, 1, 2, 99)] == [1, 1, all_reads, all_reads]


def test_numbers_of_slots():
    assert widths(16) == (1, 2, 4, 8, 16)
    assert widths(5) == (1, 2, 3, 5)
    assert widths(1) == (1,)
    assert read_limits(4) == (1, 4)
    assert read_limits(1) == (1,)

"""Whole tracking runs against upstream's rules on torch modules, at tiny sizes.

Features come from torch, so nothing of the backbone is compiled here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import oracle
from oracle.params import params_from_hf
from oracle.tracking import Features, Found, Session, encode_frame
from parity import TINY, assert_close
from sam3_jax import config
from sam3_jax.models.tracker import Tracked
from sam3_jax.tracking.config import TrackerConfig
from sam3_jax.tracking.memories import frame_at
from sam3_jax.tracking.programs import Programs
from sam3_jax.tracking.prompts import ObjectClicks, pack_clicks
from sam3_jax.tracking.state import TrackState
from sam3_jax.types import ClickPrompt
from upstream_memory import Rules

# transformers fixes the memory's width at 64 and pointers are parted into it.
CONFIG = dataclasses.replace(
    config.tiny(), dim=128, memory=dataclasses.replace(config.tiny().memory, dim=64)
)
FRAMES, SLOTS = 6, 4
POINTS = np.array([[40.0, 50.0], [60.0, 30.0]]), np.array([1, 0])
POINT = np.array([[80.0, 20.0]]), np.array([1])
RULES = Rules("object", FRAMES)
BOX = np.array([[20.0, 30.0], [70.0, 90.0]]), np.array([2, 3])

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def tracker():
    """Torch's tracker, in whose opinion objects are absent now and then."""
    model = oracle.randomize(oracle.tracker_video(CONFIG), seed=3)
    with torch.no_grad():
        model.mask_decoder.pred_obj_score_head.proj_out.bias -= 0.8
    return model


@pytest.fixture(scope="module")
def params(tracker) -> dict:
    return jax.tree.map(jnp.asarray, params_from_hf(tracker, CONFIG))


@pytest.fixture(scope="module")
def clip(tracker) -> list[Features]:
    """Torch's features of six different frames."""
    side = CONFIG.image_size
    pixels = np.random.default_rng(5).uniform(-1, 1, (FRAMES, side, side, 3))
    return [encode_frame(tracker, x) for x in pixels.astype(np.float32)]


@pytest.fixture(scope="module")
def levels(clip) -> list:
    """The same as our pyramids."""
    return [x.arrays() for x in clip]


@pytest.fixture(scope="module")
def own() -> Programs:
    """Selection by each object's own score, our default."""
    return Programs(CONFIG, TrackerConfig())


@pytest.fixture(scope="module")
def shared() -> Programs:
    """Selection by the mean over objects, as the released model does."""
    return Programs(CONFIG, TrackerConfig(selection="session"))


def clicks(prompts: dict[int, tuple]) -> ClickPrompt:
    side = 4 * CONFIG.image_size // CONFIG.vision.patch_size
    return pack_clicks({k: ObjectClicks(*v) for k, v in prompts.items()}, SLOTS, (side, side))


def only(*slots: int) -> np.ndarray:
    return np.isin(np.arange(SLOTS), slots)


def arrays(found: Tracked) -> Tracked:
    """As numpy: indexing jax arrays would compile a program for each index."""
    return Tracked(*map(np.asarray, found))


def assert_agrees(found: Tracked, slot: int, expected: Found, where: str) -> None:
    found, where = arrays(found), f"{where}, slot {slot}"
    spread = float(np.ptp(expected.mask))
    spread = spread if spread > 1 else 1024.0  # an absent object's is -1024 but for rounding
    assert_close(found.masks[slot], expected.mask, TINY, f"mask of {where}", spread=spread)
    assert_close(found.pointers[slot], expected.pointer, TINY, f"pointer of {where}")
    assert_close(found.iou[slot], expected.iou, TINY, f"iou of {where}", spread=1.0)
    spread = max(1.0, abs(expected.object_logit))
    assert_close(
        found.object_logits[slot], expected.object_logit, TINY, f"logit of {where}", spread=spread
    )


def assert_remembers(state: TrackState, slot: int, frame: int, expected: Found) -> None:
    at = np.flatnonzero(np.asarray(state.map_frames)[slot] == frame)
    assert len(at) == 1, f"frame {frame} is stored in places {at}"
    assert_close(
        np.asarray(state.maps)[slot, at[0]], expected.memory, TINY, f"memory of frame {frame}"
    )


def start(
    programs: Programs, params: dict, level: tuple, session: Session, prompts: dict, frame: int
) -> TrackState:
    """Prompts both sides on a frame (objects in the order of ``prompts``) and compares."""
    now = frame_at(frame, FRAMES)
    every = only(*prompts)
    state = programs.add(programs.empty_state(slots=SLOTS), every)
    found = programs.prompt(params, level, clicks(prompts))
    for i, (slot, prompt) in enumerate(prompts.items()):
        assert_agrees(found, slot, session.prompt(frame, i, *prompt), "prompt")
    session.finish_prompts(frame)
    state = programs.memorize(params, state, level, now, found, every, every, every)
    for i, slot in enumerate(prompts):
        assert_remembers(state, slot, frame, session.found(frame, i))
    return state


def assert_follows(
    step: Callable,
    state: TrackState,
    levels: list,
    session: Session,
    slots: list[int],
    frames: range,
    *,
    backward: bool = False,
) -> tuple[TrackState, list[list[Found]]]:
    """Tracks both sides over frames and compares; what the oracle found."""
    results = []
    for t in frames:
        now = frame_at(t, FRAMES, backward=backward)
        expected = session.track(t, backward=backward)
        state, found = step(state, levels[t], now)
        results.append(expected)
        for slot, result in zip(slots, expected, strict=True):
            assert_agrees(found, slot, result, f"frame {t}")
            assert_remembers(state, slot, t, result)
    return state, results


def test_points_and_box_then_a_correction(tracker, params, clip, levels, own):
    """Selection leaves frames out, an object goes away; then one is corrected on frame 3."""

    def step(*args):
        return own.track(params, *args)

    session = Session(tracker, clip, 2, RULES)
    state = start(own, params, levels[0], session, {0: POINTS, 2: BOX}, 0)
    state, results = assert_follows(step, state, levels, session, [0, 2], range(1, FRAMES))
    present = {r.object_logit > 0 for found in results for r in found}
    assert present == {True, False}
    good = {bool(out["score"] > 0.01) for out in session.tracked[0].values()}
    assert good == {True, False}

    # As upstream, the frame becomes a prompted one of all objects.
    before = [session.found(3, i) for i in range(2)]
    prompt = (*POINT, before[0].mask)
    found = own.prompt(params, levels[3], clicks({0: prompt}))
    assert_agrees(found, 0, session.prompt(3, 0, *prompt), "correction")
    session.finish_prompts(3)
    found = Tracked(*(np.array(x) for x in found))
    found.masks[2], found.iou[2] = before[1].mask, before[1].iou
    found.object_logits[2], found.pointers[2] = before[1].object_logit, before[1].pointer
    every = only(0, 2)
    now = frame_at(3, FRAMES)
    state = own.memorize(params, state, levels[3], now, found, every, every, every)
    for i, slot in enumerate((0, 2)):
        assert_remembers(state, slot, 3, session.found(3, i))
    assert_follows(step, state, levels, session, [0, 2], range(4, FRAMES))


def test_masks_as_prompts(tracker, params, clip, levels, own, rng):
    """A later mask takes its pixels from an earlier one; an empty one is an absent object."""
    masks = np.zeros((SLOTS, 60, 80), bool)
    masks[0, 10:40, 10:50] = True
    masks[3, 20:55, 30:70] = rng.random((35, 40)) < 0.8
    session = Session(tracker, clip, 3, RULES)
    slots = [3, 0, 1]  # in the order they were given: slot 0 after slot 3, 1 is empty
    for i, slot in enumerate(slots):
        session.prompt_mask(0, i, masks[slot])
    session.finish_prompts(0)
    given = own.mask_prompt(masks, jnp.asarray([1, 2, 9, 0]), levels[0][2].shape[1:3])
    found = own.prompt_mask(params, levels[0], given)
    for i, slot in enumerate(slots):
        assert_agrees(found, slot, session.found(0, i), "mask prompt")
    every = only(*slots)
    state = own.add(own.empty_state(slots=SLOTS), every)
    now = frame_at(0, FRAMES)
    state = own.memorize(params, state, levels[0], now, found, every, every, every)
    for i, slot in enumerate(slots):
        assert_remembers(state, slot, 0, session.found(0, i))
    # Detections come at the memory encoder's size, not the video's. (At 61 x 83 no pixel is on
    # exactly one half, where rounding would decide.)
    large = np.zeros((SLOTS, 128, 128), bool)
    large[1, 10:90, 30:60], large[2, 40:110, 20:100] = True, rng.random((70, 80)) < 0.8
    detected = Session(tracker, clip, 2, RULES)
    order = jnp.arange(SLOTS)
    logits = own.mask_prompt(large, order, levels[0][2].shape[1:3], (61, 83)).logits
    for slot in (1, 2):
        detected.prompt_mask(0, slot - 1, large[slot], (61, 83))
    for slot in (1, 2):
        expected = detected.found(0, slot - 1).mask
        assert_close(np.asarray(logits)[slot], expected, TINY, "mask of a detection")

    # Tracking the prompted frame itself leaves its memory alone.
    kept = jax.tree.map(np.asarray, state)
    state, _ = own.track(params, state, levels[0], now)
    jax.tree.map(np.testing.assert_array_equal, state, kept)
    assert_follows(
        lambda *args: own.track(params, *args), state, levels, session, slots, range(1, 4)
    )


def test_memory_of_concept_tracking(tracker, params, clip, levels, own):
    """Somebody else decides on the masks; the first frame's map is overwritten, not its pointer."""
    session = Session(tracker, clip, 2, RULES)
    state = start(own, params, levels[0], session, {0: POINTS, 2: BOX}, 0)
    none, every = only(), only(0, 2)
    side = levels[0][0].shape[1]
    masks = np.full((SLOTS, side, side), -10.0, np.float32)
    masks[0, 5:20, 7:30] = np.linspace(-3, 4, 23)
    found = Tracked(masks, np.ones(SLOTS), np.full(SLOTS, 3.0), np.zeros((SLOTS, CONFIG.dim)))
    found = Tracked(*(jnp.asarray(x, jnp.float32) for x in found))
    pointers = np.asarray(state.pointers)
    args = levels[0], frame_at(0, FRAMES), found, every, none, none
    state = own.memorize_concept(params, state, *args)
    for i, slot in enumerate((0, 2)):
        assert_remembers(state, slot, 0, session.overwrite(0, i, masks[slot]))
    np.testing.assert_array_equal(state.pointers, pointers)
    assert_follows(
        lambda *args: own.track(params, *args), state, levels, session, [0, 2], range(1, 3)
    )


def test_backward(tracker, params, clip, levels, own):
    """From the last frame to the first."""
    session = Session(tracker, clip, 2, RULES)
    state = start(own, params, levels[5], session, {1: POINT, 2: BOX}, 5)
    frames = range(FRAMES - 2, -1, -1)
    assert_follows(
        lambda *args: own.track(params, *args),
        state, levels, session, [1, 2], frames, backward=True,
    )  # fmt: skip


def test_chunk_with_shared_selection(tracker, params, clip, levels, own, shared):
    """Five frames in one program, objects kept or left out together."""
    prompts = {0: POINTS, 2: POINT}
    session = Session(tracker, clip, 2, Rules("session", FRAMES))
    state = start(own, params, levels[0], session, prompts, 0)
    chunk = tuple(np.concatenate(level) for level in zip(*levels[1:], strict=True))
    state, found = shared.track_chunk(params, state, chunk, frame_at(1, FRAMES))
    alone = Session(tracker, clip, 2, RULES)
    for i, prompt in enumerate(prompts.values()):
        alone.prompt(0, i, *prompt)
    alone.finish_prompts(0)
    differences = []
    for t in range(1, FRAMES):
        for slot, expected, other in zip(prompts, session.track(t), alone.track(t), strict=True):
            assert_agrees(Tracked(*(x[t - 1] for x in arrays(found))), slot, expected, f"frame {t}")
            differences.append(abs(expected.object_logit - other.object_logit))
    assert max(differences) > 0.01  # selection by own scores would have given something else


def test_chunk_is_step_by_step(params, levels, own, shared):
    """The mean over one object is its own score, so the two selections must agree too."""
    now, one = frame_at(0, FRAMES), only(3)
    found = own.prompt(params, levels[0], clicks({3: POINTS}))
    states = []
    for _ in range(2):
        state = own.add(own.empty_state(slots=SLOTS), one)
        states.append(own.memorize(params, state, levels[0], now, found, one, one, one))
    chunk = tuple(np.concatenate(level) for level in zip(*levels[1:], strict=True))
    states[0], found = shared.track_chunk(params, states[0], chunk, frame_at(1, FRAMES))
    found = arrays(found)
    for t in range(1, FRAMES):
        states[1], step = own.track(params, states[1], levels[t], frame_at(t, FRAMES))
        for name in Tracked._fields:
            expected = np.asarray(getattr(step, name))[3]
            spread = max(1.0, float(np.ptp(expected)))  # masks of absent objects are constant
            # The same sums, otherwise fused.
            assert_close(getattr(found, name)[t - 1, 3], expected, 1e-5, name, spread=spread)
    for name in ("map_frames", "map_good", "pointer_frames", "pointer_good"):
        np.testing.assert_array_equal(*(getattr(state, name) for state in states))
    assert_close(states[0].maps, states[1].maps, 1e-5, "maps")


def test_company_changes_nothing_and_nothing_compiles(params, levels, own):
    """Objects come and go around one that is tracked alone elsewhere."""
    prompts = {1: BOX, 0: POINT, 3: POINTS}
    found = own.prompt(params, levels[0], clicks(prompts))

    def begin(*slots: int) -> TrackState:
        state = own.add(own.empty_state(slots=SLOTS), only(*slots), 1)
        return remember(state, 0, *slots)

    def remember(state: TrackState, frame: int, *slots: int) -> TrackState:
        args = (levels[frame], frame_at(frame, FRAMES), found, only(*slots), only(*slots))
        return own.memorize(params, state, *args, only())

    alone, company = begin(1), begin(1, 3)
    programs = (own.track, own.add, own.remove, own.memorize)
    for t in range(1, 5):
        if t == 2:
            company = own.add(company, only(0), 2)
            company = remember(company, 1, 0)
            alone, _ = own.track(params, alone, levels[t], frame_at(t, FRAMES))
            company, _ = own.track(params, company, levels[t], frame_at(t, FRAMES))
            company = own.remove(company, only(3))
            compiled = [program._cache_size() for program in programs]
            continue
        alone, one = own.track(params, alone, levels[t], frame_at(t, FRAMES))
        company, many = own.track(params, company, levels[t], frame_at(t, FRAMES))
        for name in Tracked._fields:
            pair = (np.asarray(getattr(x, name))[1] for x in (many, one))
            np.testing.assert_array_equal(*pair, name)
    company = own.remove(own.add(company, only(3), 7), only(0))
    assert [program._cache_size() for program in programs] == compiled
    np.testing.assert_array_equal(company.valid, only(1, 3))
    # Free slots, and one without a memory, give finite nothings.
    _, many = own.track(params, company, levels[5], frame_at(5, FRAMES))
    assert all(np.isfinite(x).all() for x in many)
    assert (arrays(many).masks[[0, 2]] == -1024).all()


def test_bfloat16_keeps_its_dtypes(params, levels):
    """Maps in the compute dtype, all else as in float32; a scan would refuse another state."""
    programs = Programs(CONFIG, TrackerConfig(), dtype=jnp.bfloat16)
    state = jax.eval_shape(functools.partial(programs.empty_state, slots=SLOTS))
    chunk = tuple(jax.ShapeDtypeStruct((3, *x.shape[1:]), jnp.bfloat16) for x in levels[0])
    after, found = jax.eval_shape(programs.track_chunk, params, state, chunk, frame_at(1))
    assert after == state
    assert after.maps.dtype == jnp.bfloat16
    assert {x.dtype for x in (*found, after.pointers)} == {jnp.dtype("float32")}
    assert found.masks.shape == (3, SLOTS, *levels[0][0].shape[1:3])

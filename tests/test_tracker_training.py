"""Training of the tracker: what is compared with what, what learns, and what must not change."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny_clips
from sam3_jax.models.detector import Sam3
from sam3_jax.models.sam_heads import NOT_A_POINT
from sam3_jax.tracking import masks as tracking_masks
from sam3_jax.tracking.memories import frame_at
from sam3_jax.tracking.state import empty_state
from sam3_jax.tracking.step import Setup, memorize, prompt_mask, recall
from sam3_jax.training.batch import normalize
from sam3_jax.training.lora import add_lora
from sam3_jax.training.optimizer import path_of
from sam3_jax.training.state import TrainState, init_state
from sam3_jax.training.step import StepConfig
from sam3_jax.training.tracker_clip import TrackerTrainingConfig, clip_loss, training_rules
from sam3_jax.training.tracker_step import make_clip_step
from sam3_jax.types import ClickPrompt

pytestmark = pytest.mark.optimised


def by_masks() -> TrackerTrainingConfig:
    """Everything is given by masks on the first frame: nothing is left to chance."""
    config = TrackerTrainingConfig()
    config.prompting.mask, config.prompting.box = 1.0, 0.0
    config.prompting.second_prompt = config.prompting.second_correction = 0.0
    config.prompting.corrections = 0
    return config


def hypotheses(module: Sam3, params: dict, clip, size: tuple[int, int]):
    """All that the model says on frame 1 of a clip, by the functions that sessions call."""
    count, rules = len(clip.masks), training_rules(module.config.memory.num_maps, 2)
    setup = Setup(module, rules)
    pixels = normalize(clip.frames)
    levels = [
        module.apply({"params": params}, pixels[t : t + 1], method="encode_image").tracker
        for t in range(2)
    ]
    state = empty_state(rules, module.config, slots=count)
    state = state._replace(valid=jnp.ones(count, bool), group=jnp.arange(count))
    # One by one, as in training: objects of a clip may overlap.
    order = jnp.zeros(1, jnp.int32)
    given = [tracking_masks.mask_prompt(m[None], order, size) for m in clip.masks[:, 0]]
    given = jax.tree.map(lambda *parts: jnp.concatenate(parts), *given)
    found = prompt_mask(params, levels[0], given, setup=setup)
    yes = jnp.ones(count, bool)
    state = memorize(params, state, levels[0], frame_at(0, 2), found, yes, yes, yes, setup=setup)

    def heads(module: Sam3, levels, memory):
        fine, middle, coarse = levels
        fine, middle = (jnp.repeat(x, count, axis=0) for x in (fine, middle))
        nothing = ClickPrompt(
            jnp.zeros((count, 1, 2)),
            jnp.full((count, 1), NOT_A_POINT, jnp.int32),
            jnp.zeros((count, *fine.shape[1:3])),
            jnp.zeros(count, bool),
        )
        coarse = module.tracker.condition(coarse, memory)
        return module.tracker.heads((fine, middle, coarse), nothing)

    memory = recall(state, frame_at(1, 2), rules)
    last = module.config.memory.num_maps  # the prompted frames' row of the temporal table
    memory = memory._replace(rows=jnp.where(memory.rows == rules.num_maps, last, memory.rows) - 1)
    return module.apply({"params": params}, levels[1], memory, method=heads)


def hand_worked(out, masks: np.ndarray) -> dict[str, float]:
    """The paper's loss of one frame, in numpy."""
    logits, iou = np.asarray(out.masks[:, 1:], np.float64), np.asarray(out.iou[:, 1:], np.float64)
    p = 1 / (1 + np.exp(-logits))
    t = masks[:, None].astype(np.float64)
    log = t * np.log(p) + (1 - t) * np.log(1 - p)
    away = t * (1 - p) + (1 - t) * p
    focal = (-(0.25 * t + 0.75 * (1 - t)) * away**2 * log).mean((2, 3))
    dice = 1 - (2 * (p * t).sum((2, 3)) + 1) / (p.sum((2, 3)) + t.sum((2, 3)) + 1)
    both, either = ((f(logits > 0, t > 0)).sum((2, 3)) for f in (np.logical_and, np.logical_or))
    off = np.abs(iou - both / np.maximum(either, 1))
    best = (20 * focal + dice).argmin(1)
    rows, there = np.arange(len(masks)), masks.any((1, 2))
    present = 1 / (1 + np.exp(-np.asarray(out.object_logits, np.float64)))
    occlusion = -np.where(there, np.log(present), np.log(1 - present))
    count = len(masks)
    parts = {"track_mask": focal, "track_dice": dice, "track_iou": off}
    terms = {name: (x[rows, best] * there).sum() / count for name, x in parts.items()}
    return terms | {"track_object": occlusion.sum() / count}


def test_the_loss_is_that_of_what_sessions_find():
    """One clip, two frames; an object leaves. Padding beside it counts for nothing."""
    model = tiny_clips.model_config()
    module, params = Sam3(model), tiny_clips.params(model)
    made = tiny_clips.batch(clips=1, objects=3, frames=2)
    made.valid[0, 1] = False
    loss = jax.jit(lambda p, b: clip_loss(module, p, b, by_masks(), jax.random.key(0)))
    total, terms = loss.lower(params, made).compile(tiny_clips.QUICK)(params, made)

    keep = np.array([0, 2])
    clip = made._replace(frames=made.frames[0], masks=made.masks[0][keep])
    find = jax.jit(lambda p, clip: hypotheses(module, p, clip, (8, 8)))
    find = find.lower(params, clip).compile(tiny_clips.QUICK)
    expected = hand_worked(find(params, clip), clip.masks[:, 1])
    assert clip.masks[:, 1].any((1, 2)).tolist() == [True, False]
    for name, value in expected.items():
        # float32 through all layers, with masks that are resized twice.
        np.testing.assert_allclose(terms[name], value, rtol=2e-3, err_msg=name)
    weights = {"track_mask": 20, "track_dice": 1, "track_iou": 1, "track_object": 1}
    whole = sum(weight * expected[name] for name, weight in weights.items())
    np.testing.assert_allclose(total, whole, rtol=2e-3)


def test_what_is_frozen_has_no_moments_and_what_cannot_learn_may_not():
    model, config = tiny_clips.model_config(), TrackerTrainingConfig()
    shapes = jax.eval_shape(
        lambda p: init_state(p, tiny_clips.optimizer(config, ema=0.9)), tiny_clips.params(model)
    )
    moments = {
        path_of(path)
        for path, leaf in jax.tree_util.tree_flatten_with_path(shapes.opt_state[1].mu)[0]
    }
    assert moments
    assert {path.split("/")[0] for path in moments} == {"tracker", "vision"}
    assert all(path.startswith(("tracker/", "vision/tracker_neck/")) for path in moments)
    assert "tracker/prompt_encoder/gaussian" not in moments
    assert jax.tree.structure(shapes.ema) == jax.tree.structure(shapes.opt_state[1].mu)

    thawed = tiny_clips.optimizer(config)._replace(frozen=("^text/",))
    state = jax.eval_shape(lambda p: init_state(p, thawed), tiny_clips.params(model))
    step = make_clip_step(model, config, thawed, StepConfig("float32"))
    with pytest.raises(ValueError, match="decoder/.* would train, but the loss does not reach it"):
        jax.eval_shape(step, state, tiny_clips.batch())


@pytest.mark.slow
def test_it_learns_and_leaves_the_image_model_alone():
    """Every kind of prompt and of correction happens within some steps."""
    model, config = tiny_clips.model_config(), TrackerTrainingConfig()
    config.prompting.corrections = 1
    optimizer = tiny_clips.optimizer(config)
    before = tiny_clips.params(model)
    state = init_state(jax.tree.map(np.array, before), optimizer)
    batch = tiny_clips.batch()
    step = make_clip_step(model, config, optimizer, StepConfig("float32")).lower(state, batch)
    step, history = step.compile(), []
    for _ in range(60):
        state, metrics = step(state, batch)
        history.append({name: float(value) for name, value in metrics.items()})
    assert history[-1]["skipped"] == 0

    def mean(name: str, part: list[dict[str, float]]) -> float:
        return float(np.mean([metrics[name] for metrics in part]))

    # Sums over as many answers as there happen to be: means over several steps.
    assert mean("loss", history[-15:]) < 0.7 * mean("loss", history[:15])
    assert mean("tracked_iou", history[-15:]) > mean("tracked_iou", history[:15]) + 0.1

    still = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(state.params)[0]:
        name, old = path_of(path), before
        for key in path:
            old = old[key.key]
        same = np.array_equal(leaf, old)
        if not name.startswith(("tracker/", "vision/tracker_neck/")) or name.endswith("gaussian"):
            assert same, name
        elif same:
            still.append(name)
    assert not still  # everything of the tracker is reached


@pytest.mark.slow
def test_a_batch_in_parts_and_lora_alone():
    """Two clips one after the other are one batch, kept frames are frames computed again; with LoRA
    nothing else moves."""
    model, config = tiny_clips.model_config(), by_masks()
    optimizer, batch = tiny_clips.optimizer(config), tiny_clips.batch(clips=2)
    before = tiny_clips.params(model)
    patterns = (r"^tracker/.*attn/[qv]$", r"^tracker/mask_decoder/.*mlp")

    def advance(accumulate: int, *, remat: bool = True) -> tuple[TrainState, dict]:
        config.remat = remat
        lora = add_lora(before, patterns, 2, jax.random.key(0))
        state = init_state(tiny_clips.params(model), optimizer, lora=lora)
        settings = StepConfig("float32", accumulate=accumulate)
        step = make_clip_step(model, config, optimizer, settings, alpha=8.0)
        return step.lower(state, batch).compile(tiny_clips.QUICK)(state, batch)

    whole, expected = advance(1)
    theirs = jax.tree.leaves(whole.opt_state[1].mu)
    largest = max(float(np.abs(x).max()) for x in theirs)
    assert largest > 0
    for parts, found in (advance(2), advance(1, remat=False)):
        # float32 sums in another order; compared by the moments, as Adam's first step is all signs.
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
        np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=1e-4)
        for x, y in zip(jax.tree.leaves(parts.opt_state[1].mu), theirs, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5 * largest)

    jax.tree.map(np.testing.assert_array_equal, whole.params, before)
    # B begins at zero, so that A has no gradient yet.
    fresh = add_lora(before, patterns, 2, jax.random.key(0))
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), whole.lora, fresh)
    assert all(m for path, m in jax.tree_util.tree_leaves_with_path(moved) if path[-1].key == "b")

"""Simulated clicks inside the step: where they fall, and that the interactive head learns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tiny_predictor
from sam3_jax.models.detector import Sam3
from sam3_jax.training.batch import Clicks
from sam3_jax.training.clicks import ClickConfig, click_loss, correct
from sam3_jax.types import ClickOutput

SIDE, MASK = 112, 28
QUICK = {"xla_backend_optimization_level": 0}


def square(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((MASK, MASK), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_corrections_fall_where_the_prediction_is_wrong():
    empty, goal = square(0, 0, 0, 0), square(4, 6, 10, 20)
    cases = [  # predicted, mask, where the point must be, label
        (empty, goal, goal, 1),  # all missed
        (square(4, 6, 10, 19), goal, square(4, 19, 10, 20), 1),  # one row missed
        (square(4, 6, 11, 20), goal, square(10, 6, 11, 20), 0),  # one column too much
        (goal, goal, goal, 1),  # nothing wrong
        (square(2, 2, 5, 5), empty, square(2, 2, 5, 5), 0),  # there is no object
    ]
    predicted, masks, _, _ = (jnp.asarray(np.stack(x)) for x in zip(*cases, strict=True))
    drawn = jax.jit(correct, static_argnames="frame")
    seen = set()
    for seed in range(20):
        points, labels = drawn(predicted, masks, jax.random.key(seed), frame=SIDE)
        for point, label, (_, _, where, expected) in zip(points, labels, cases, strict=True):
            column, row = (np.asarray(point) * MASK / SIDE).astype(int)
            assert where[row, column]
            assert label == expected
        seen.add(tuple(np.asarray(points[0])))
    assert len(seen) > 10  # drawn anew each time
    np.testing.assert_allclose(np.array(list(seen)) % 4, 2, atol=1e-4)  # middles of 4 x 4 pixels


@pytest.mark.parametrize("valid", [True, False])
def test_discs_take_the_objects_places(valid: bool):
    """A perfect answer to "what is near the first point", not to the object, has no loss."""
    points = jnp.asarray([[[30.0, 50.0], [0, 0]], [[90.0, 10.0], [5, 5]]])
    row, column = np.mgrid[:MASK, :MASK] * 4 + 2
    near = np.stack([np.hypot(column - x, row - y) < 19 for x, y in ((30, 50), (90, 10))])
    objects = jnp.asarray(np.stack([square(0, 0, 9, 9), square(3, 3, 20, 20)]))
    yes = jnp.full((1, 2), valid)
    clicks = Clicks(points[None], jnp.full((1, 2, 2), -2).at[..., 0].set(1), objects[None], yes)

    def answer(prompt) -> ClickOutput:
        masks = jnp.asarray(np.where(near, 20.0, -20.0), jnp.float32)[:, None].repeat(4, axis=1)
        return ClickOutput(masks, jnp.ones((2, 4)), jnp.full(2, 20.0), jnp.zeros((2, 4, 8)))

    config = ClickConfig(weight=1.0, corrections=0, disc=19.0)
    key = jax.random.key(0)
    total, terms = click_loss(answer, clicks, config, key, frame=SIDE, mask_side=MASK)
    assert float(terms["click_first_iou"]) == valid
    assert float(total) == pytest.approx(0, abs=1e-3)  # of logits of 20
    config.disc = 0.0
    total, _ = click_loss(answer, clicks, config, key, frame=SIDE, mask_side=MASK)
    assert (float(total) > 1) == valid


@pytest.fixture(scope="module")
def session():
    """One image with two objects (and a filler); the head alone trains on fixed features."""
    model = tiny_predictor.config()
    params = jax.tree.map(jnp.asarray, tiny_predictor.params())
    module = Sam3(model)
    masks = np.stack([square(4, 4, 14, 14), square(18, 12, 26, 26), square(0, 0, 0, 0)])
    pixels = np.full((1, SIDE, SIDE, 3), -1, np.float32)
    for mask in masks:
        pixels[0, np.kron(mask, np.ones((4, 4))) > 0] = 1
    levels = module.apply({"params": params}, jnp.asarray(pixels), method="encode_image").tracker
    levels = tuple(jnp.repeat(level, 3, axis=0) for level in levels)
    points = np.array([[[36, 36], [0, 0]], [[72, 48], [104, 104]], [[0, 0], [0, 0]]], np.float32)
    labels = np.array([[1, -2], [2, 3], [-2, -2]], np.int32)
    clicks = Clicks(points, labels, masks, np.array([True, True, False]))
    clicks = jax.tree.map(lambda x: jnp.asarray(x)[None], clicks)

    def loss(tracker, clicks, key):
        def click(prompt):
            weights = {"params": {**params, "tracker": tracker}}
            return module.apply(weights, levels, prompt, None, method="click")

        config = ClickConfig(weight=1.0, corrections=2)
        return click_loss(click, clicks, config, key, frame=SIDE, mask_side=32)

    start = params["tracker"]
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    run = run.lower(start, clicks, jax.random.key(0)).compile(QUICK)
    return run, start, clicks


def learn(session, steps: int) -> list[dict[str, float]]:
    run, tracker, clicks = session
    optimizer = optax.adam(1e-3)
    state, history = optimizer.init(tracker), []
    for number in range(steps):
        (total, terms), grads = run(tracker, clicks, jax.random.key(number))
        updates, state = optimizer.update(grads, state)
        tracker = optax.apply_updates(tracker, updates)
        history.append({"total": float(total), **{k: float(v) for k, v in terms.items()}})
    return history


@pytest.mark.slow
def test_the_loss_falls(session):
    history = learn(session, 30)
    assert history[-1]["total"] < 0.5 * history[0]["total"]


@pytest.mark.slow
def test_the_head_learns_to_take_corrections(session):
    """At first it sinks to "nothing here", as most pixels are; from there to the objects."""
    history = learn(session, 300)
    assert history[0]["click_last_iou"] < 0.3
    assert history[-1]["click_last_iou"] > 0.95
    assert history[-1]["total"] < 0.02 * history[0]["total"]


def test_what_the_loss_reaches(session):
    run, tracker, clicks = session
    (_, terms), grads = run(tracker, clicks, jax.random.key(0))
    reached = {name for name, tree in grads.items() if any(map(np.any, jax.tree.leaves(tree)))}
    assert reached == {"mask_decoder", "no_memory_embed", "prompt_encoder"}
    # Fillers count for nothing, whatever is in them.
    noisy = clicks._replace(masks=clicks.masks.at[0, 2].set(True))
    again = run(tracker, noisy, jax.random.key(0))[0][1]
    for name, value in terms.items():
        assert float(again[name]) == pytest.approx(float(value), abs=1e-6), name

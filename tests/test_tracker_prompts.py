"""The simulated user of the tracker's training does what it should, as often as it should."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3_jax.models.sam_heads import PADDING
from sam3_jax.training.clip_batch import ClipBatch, cut_clips
from sam3_jax.training.conversation import Rules, next_click
from sam3_jax.training.interactive import InteractiveLossConfig
from sam3_jax.training.tracker_clip import TrackerTrainingConfig, training_rules
from sam3_jax.training.tracker_prompts import (
    BOX,
    CORRECTION,
    MASK,
    NOTHING,
    POINT,
    PROMPT,
    PromptingConfig,
    draw_plan,
    first_points,
    noisy_boxes,
)
from sam3_jax.training.tracker_step import unused_by_clips

FRAME = 1008


def blocks(*boxes: tuple[int, int, int, int], side: int = 42) -> jnp.ndarray:
    """Masks that fill boxes (x0, y0, x1, y1)."""
    masks = np.zeros((len(boxes), side, side), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    return jnp.asarray(masks)


def test_prompts_are_drawn_as_often_as_the_configuration_says():
    config = PromptingConfig()
    plan = draw_plan(jax.random.key(0), 4000, 8, config)
    share = [float((plan.kinds == kind).mean()) for kind in (MASK, POINT, BOX)]
    # Standard deviations of the shares are below .008.
    np.testing.assert_allclose(share, [0.5, 0.25, 0.25], atol=0.03)
    draw = jax.jit(jax.vmap(lambda key: draw_plan(key, 1, 8, config)))
    plans = draw(jax.random.split(jax.random.key(1), 4000))
    share = [float((plans.deed == deed).mean()) for deed in (PROMPT, CORRECTION, NOTHING)]
    np.testing.assert_allclose(share, [0.5, 0.25, 0.25], atol=0.03)
    assert set(np.unique(plans.second)) == set(range(1, 8))
    assert int(draw_plan(jax.random.key(0), 1, 1, PromptingConfig(second_prompt=1.0)).deed) == 0


def test_points_lie_on_the_object_and_boxes_around_it():
    masks = blocks((4, 10, 9, 30), (4, 10, 9, 30), (4, 10, 9, 30))
    kinds = jnp.array([MASK, POINT, BOX])
    config = PromptingConfig(box_noise=0.0)
    for seed in range(3):
        points, labels = first_points(masks, kinds, jax.random.key(seed), config, frame=FRAME)
        assert labels.tolist() == [[PADDING, PADDING], [1, PADDING], [2, 3]]
        x, y = (points[1, 0] * 42 / FRAME).tolist()
        assert 4 < x < 9
        assert 10 < y < 30
        np.testing.assert_allclose(points[2], np.array([[4, 10], [9, 30]]) * 24)


def test_boxes_are_drawn_by_hand_but_not_too_badly():
    masks = blocks((2, 2, 40, 12), (20, 20, 21, 21), (0, 0, 0, 0))
    draw = jax.jit(jax.vmap(lambda key: noisy_boxes(masks, key, PromptingConfig(), frame=FRAME)))
    found = np.asarray(draw(jax.random.split(jax.random.key(0), 2000)))
    exact = np.array([[2, 2], [40, 12]]) * 24
    moved = found[:, 0] - exact
    assert np.abs(moved).max() <= 20 + 1e-3  # pixels of 1008
    # A tenth of the sides: of the small ones (240) little is cut off at 20 pixels, 24 a deviation.
    assert 12 < moved[:, 0, 1].std() < 20
    assert (found[:, 1, 1] > found[:, 1, 0]).all()  # a single cell keeps an area
    np.testing.assert_allclose(found[0, 2], [[0, 0], [FRAME, FRAME]], atol=20)  # nothing: all


@pytest.mark.parametrize("on_object", [0.0, 1.0])
def test_corrections_come_from_the_error_or_from_the_object(on_object):
    """Half of the object was found: the error is the other half."""
    masks = blocks((10, 10, 30, 20))
    logits = jnp.where(blocks((10, 10, 20, 20)), 5.0, -5.0)
    rules = Rules(InteractiveLossConfig(), 1, FRAME, 7, on_object, (42, 42))
    draw = jax.jit(jax.vmap(lambda key: next_click(logits, masks, key, rules)))
    points, labels = draw(jax.random.split(jax.random.key(0), 200))
    x = np.asarray(points)[:, 0, 0] * 42 / FRAME
    assert (np.asarray(labels) == 1).all()
    assert ((x > 20) & (x < 30)).mean() == (1.0 if not on_object else pytest.approx(0.5, abs=0.15))


def test_what_a_clip_reads():
    assert training_rules(7, 8).num_maps == 7
    assert training_rules(7, 4).num_maps == 4  # no more maps than there are frames
    assert training_rules(7, 1).num_maps == 2
    rules = training_rules(7, 8)
    assert (rules.selection, rules.stored_conditioning) == ("none", 2)


def test_what_the_loss_does_not_reach():
    config = TrackerTrainingConfig()
    assert not any("tracker/" in pattern for pattern in unused_by_clips(config))
    config.prompting.mask = 0.0
    assert "^tracker/mask_downsample/" in unused_by_clips(config)
    config.prompting.mask = 1.0
    assert "^tracker/no_memory_embed/" in unused_by_clips(config)


def test_every_other_clip_goes_into_a_micro_batch():
    clips = np.arange(4)
    batch = ClipBatch(*(clips.reshape(4, *[1] * n) for n in (4, 4, 2, 1)))
    assert cut_clips(batch, 2).valid[..., 0].tolist() == [[0, 2], [1, 3]]
    with pytest.raises(ValueError, match="4 clips cannot be cut into 3"):
        cut_clips(batch, 3)

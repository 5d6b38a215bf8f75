"""A result never depends on what shares its batch, on padding, on the order of prompts, or on jit.

Float32, tiny size, to 1e-5 of the spread: other shapes let XLA add in another order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parity import Model, assert_close, click_prompt, geometry, random_params
from sam3_jax import config
from sam3_jax.types import ClickPrompt, GroundOutput, TextFeatures

CONFIG = config.tiny()
SHARE = 1e-5
FIELDS = ("pred_logits", "pred_boxes", "presence_logits", "pred_masks", "semantic_seg")


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(CONFIG, random_params(CONFIG))


@pytest.fixture(scope="module")
def scene(model):
    """Two images, three phrases; prompt i has i boxes."""
    rng = np.random.default_rng(3)
    pixels = rng.uniform(-1, 1, (2, 112, 112, 3)).astype(np.float32)
    ids = np.zeros((3, 32), np.int32)
    for row, length in enumerate((3, 12, 32)):
        ids[row, :length] = rng.integers(300, 40000, length)
    boxes = rng.uniform(0.2, 0.6, (3, 2, 4)).astype(np.float32)
    labels = np.array([[1, 1], [1, 0], [0, 1]])
    mask = np.array([[0, 0], [1, 0], [1, 1]], bool)
    levels = model("encode_image", pixels, tracker=False).detector
    return pixels, levels, model("encode_text", ids), (boxes, labels, mask)


def ground(model, levels, text, given, images, texts) -> GroundOutput:
    boxes, labels, mask = given
    geo = geometry(len(boxes), boxes, labels, box_mask=mask)
    return model("ground", levels, text, geo, np.asarray(images), np.asarray(texts))


def assert_same(a: GroundOutput, b: GroundOutput, rows_a, rows_b) -> None:
    for name in FIELDS:
        left, right = (np.asarray(getattr(o, name)) for o in (a, b))
        assert_close(left[rows_a], right[rows_b], SHARE, name, spread=float(np.ptp(right)))


@pytest.fixture(scope="module")
def together(model, scene):
    _, levels, text, given = scene
    return ground(model, levels, text, given, [0, 1, 0], [0, 1, 2])


@pytest.mark.parametrize("i", [0, 1, 2])
def test_prompt_alone(model, scene, together, i):
    """Alone on its image, with just the boxes and the text it has."""
    pixels, _, text, (boxes, labels, mask) = scene
    image = [0, 1, 0][i]
    levels = model("encode_image", pixels[image : image + 1], tracker=False).detector
    count = mask[i].sum()
    given = boxes[i : i + 1, :count], labels[i : i + 1, :count], mask[i : i + 1, :count]
    one = TextFeatures(text.tokens[i : i + 1], text.mask[i : i + 1])
    alone = ground(model, levels, one, given, [0], [0])
    assert_same(alone, together, [0], [i])


def test_order_of_prompts(model, scene, together):
    _, levels, text, given = scene
    turn = np.array([2, 0, 1])
    turned = ground(
        model, levels, text, tuple(v[turn] for v in given), np.array([0, 1, 0])[turn], turn
    )
    assert_same(turned, together, np.argsort(turn), slice(None))


def test_padding_boxes(model, scene, together):
    """Garbage in masked slots changes nothing."""
    _, levels, text, (boxes, labels, mask) = scene
    more = np.concatenate([boxes, np.full((3, 4, 4), 0.9, np.float32)], axis=1)
    more[~np.pad(mask, ((0, 0), (0, 4)))] = 0.77
    given = more, np.pad(labels, ((0, 0), (0, 4))), np.pad(mask, ((0, 0), (0, 4)))
    padded = ground(model, levels, text, given, [0, 1, 0], [0, 1, 2])
    assert_same(padded, together, slice(None), slice(None))


def test_padding_text(model, scene, together):
    """Garbage in the text's padding changes nothing."""
    _, levels, text, given = scene
    tokens = jnp.where(text.mask[..., None], text.tokens, 7.0)
    out = ground(model, levels, TextFeatures(tokens, text.mask), given, [0, 1, 0], [0, 1, 2])
    assert_same(out, together, slice(None), slice(None))


def test_images_alone(model, scene):
    pixels, levels, *_ = scene
    for i in range(2):
        alone = model("encode_image", pixels[i : i + 1], tracker=False).detector
        for one, both in zip(alone, levels, strict=True):
            assert_close(one[0], both[i], SHARE, f"image {i}")


@pytest.mark.slow
def test_without_jit(model, scene, together):
    _, levels, text, (boxes, labels, mask) = scene
    geo = geometry(3, boxes, labels, box_mask=mask)
    index = jnp.array([0, 1, 0]), jnp.arange(3)
    with jax.disable_jit():
        out = model.module.apply(
            {"params": model.params}, levels, text, geo, *index, method="ground"
        )
    assert_same(out, together, slice(None), slice(None))


def test_clicks_in_a_batch(model, scene):
    """Clicks with few points, many points, a mask, next to each other and alone."""
    pixels = scene[0]
    levels = model("encode_image", pixels, detector=False).tracker
    rng = np.random.default_rng(5)
    mask = rng.normal(0, 5, (32, 32)).astype(np.float32)
    prompts = [
        click_prompt(32, [[10, 20]], [1]),
        click_prompt(32, [[30, 40], [50, 60]], [1, 0], box=[5, 5, 90, 80]),
        click_prompt(32, mask_input=mask),
        click_prompt(32, [[90, 100]], [1], mask_input=mask),
    ]
    batch = ClickPrompt(*(jnp.concatenate(values) for values in zip(*prompts, strict=True)))
    images = np.array([0, 1, 1, 0])
    out = model("click", levels, batch, images)
    for i, prompt in enumerate(prompts):
        used = prompt._replace(points=prompt.points[:, :5], labels=prompt.labels[:, :5])
        alone = model("click", levels, used, images[i : i + 1])
        for name in ("masks", "iou", "object_logits", "tokens"):
            a, b = getattr(alone, name)[0], getattr(out, name)[i]
            np.testing.assert_allclose(a, b, atol=SHARE * np.ptp(np.asarray(out.masks)))

"""Every stage against torch at tiny size: float32, random weights, upstream's behaviour."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import oracle
from oracle.params import params_from_hf
from parity import TINY, Model, assert_close, click_prompt, geometry
from sam3_jax import config
from sam3_jax.models.sam_heads import select_masks

CONFIG = config.tiny()
SIDE = CONFIG.image_size
FIELDS = ("pred_logits", "pred_boxes", "presence_logits", "pred_masks", "semantic_seg", "memory")
LAYERS = ("layer_logits", "layer_boxes", "layer_presence")


@pytest.fixture(scope="module")
def detector_and_params():
    """The point branch, which no transformers class has, is added to both sides."""
    detector = oracle.randomize(oracle.tiny_detector(), seed=1)
    params = params_from_hf(detector, CONFIG)
    encoder = oracle.add_point_prompts(detector, seed=1).geometry_encoder
    for ours, theirs in (("direct", "direct"), ("pool", "pool"), ("sine", "pos_enc")):
        layer = getattr(encoder, f"points_{theirs}_project")
        kernel, bias = layer.weight.detach().numpy().T, layer.bias.detach().numpy()
        params["geometry"][f"point_{ours}"] = {"kernel": kernel, "bias": bias}
    return detector, params


@pytest.fixture(scope="module")
def detector(detector_and_params):
    return detector_and_params[0]


@pytest.fixture(scope="module")
def model(detector_and_params) -> Model:
    return Model(CONFIG, detector_and_params[1])


@pytest.fixture(scope="module")
def tracker():
    return oracle.randomize(oracle.tiny_tracker(), seed=1)


@pytest.fixture(scope="module")
def click_model(tracker) -> Model:
    return Model(CONFIG, params_from_hf(tracker, CONFIG))


def pixels(rng: np.random.Generator, count: int, side: int = SIDE) -> np.ndarray:
    return rng.uniform(-1, 1, (count, side, side, 3)).astype(np.float32)


def token_ids(rng: np.random.Generator, *lengths: int) -> np.ndarray:
    """Phrases of the given lengths between start and end token, padded to 32."""
    ids = np.zeros((len(lengths), 32), np.int32)
    for row, length in zip(ids, lengths, strict=True):
        row[: length + 2] = [49406, *rng.integers(300, 40000, length), 49407]
    return ids


def boxes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    centre, size = rng.uniform(0.3, 0.7, (*shape, 2)), rng.uniform(0.05, 0.55, (*shape, 2))
    return np.concatenate([centre, size], axis=-1).astype(np.float32)


def test_vision(rng, detector, model):
    x = pixels(rng, 2)
    expected = oracle.run_vision(detector, x)
    features = model("encode_image", x, tracker=False)
    assert_close(features.trunk, expected["trunk"], TINY, "trunk")
    for i, level in enumerate(expected["levels"]):
        assert_close(features.detector[i], level, TINY, f"level {i}")


@pytest.mark.parametrize("side", [140, 84, 224])
def test_vision_at_other_resolutions(rng, model, side):
    """Grids of 10, 6 and 16 cells: padded windows of 4, tiled positions, scaled RoPE."""
    other = dataclasses.replace(CONFIG, image_size=side)
    torch_model = oracle.randomize(oracle.detector(other), seed=1)
    x = pixels(rng, 1, side)
    expected = oracle.run_vision(torch_model, x)
    features = model("encode_image", x, tracker=False)
    assert_close(features.trunk, expected["trunk"], TINY, "trunk")
    assert_close(features.detector[0], expected["levels"][0], TINY, "finest level")


def test_text(rng, detector, model):
    ids = token_ids(rng, 1, 7, 30)
    expected = oracle.run_text(detector, ids)
    text = model("encode_text", ids)
    np.testing.assert_array_equal(text.mask, expected["mask"])
    valid = expected["mask"]
    assert_close(np.asarray(text.tokens)[valid], expected["tokens"][valid], TINY, "tokens")


def test_shorter_padding_gives_the_same_text(rng, model):
    ids = token_ids(rng, 3)
    long, short = model("encode_text", ids), model("encode_text", ids[:, :8])
    assert_close(short.tokens[:, :5], long.tokens[:, :5], 1e-5, "tokens")


def ground_both(rng, detector, model, prompts: dict, *, images=2, image_index=None, dac=False):
    """Runs oracle and model on the same prompts; returns (expected, actual)."""
    x, ids = pixels(rng, images), prompts.pop("ids")
    count = len(ids)
    index = np.arange(count) if image_index is None else np.asarray(image_index)
    expected = oracle.run_detector(detector, x, ids, image_ids=index, dac=dac, **prompts)
    features = model("encode_image", x, tracker=False)
    text = model("encode_text", ids)
    geo = geometry(count, **prompts)
    out = model("ground", features.detector, text, geo, index, np.arange(count), dac=dac)
    return expected, out


def assert_outputs(expected: dict, out, fields=FIELDS + LAYERS) -> None:
    for name in fields:
        assert_close(getattr(out, name), expected[name], TINY, name)


def prompts_for(kind: str, rng: np.random.Generator) -> dict:
    """Two prompts of a kind."""
    ids = token_ids(rng, 2, 9)
    if kind == "text":
        return {"ids": ids}
    if kind == "text and boxes":
        labels = np.array([[1, 0], [1, 1]])
        return {"ids": ids, "boxes": boxes(rng, 2, 2), "box_labels": labels}
    if kind == "box alone":
        return {"ids": token_ids(rng, 1, 1), "boxes": boxes(rng, 2, 1)}
    if kind == "points and boxes, padded":
        return {
            "ids": ids,
            "boxes": boxes(rng, 2, 3),
            "box_labels": np.array([[0, 1, 1], [1, 0, 0]]),
            "box_mask": np.array([[1, 1, 0], [1, 0, 0]], bool),
            "points": rng.uniform(-0.05, 1.05, (2, 3, 2)).astype(np.float32),
            "point_labels": np.array([[1, 0, 1], [0, 1, 1]]),
            "point_mask": np.array([[1, 0, 0], [1, 1, 1]], bool),
        }
    raise ValueError(kind)


KINDS = ["text", "text and boxes", "box alone", "points and boxes, padded"]


@pytest.mark.parametrize("kind", KINDS)
def test_ground(rng, detector, model, kind):
    assert_outputs(*ground_both(rng, detector, model, prompts_for(kind, rng)))


def test_pairs_by_index(rng, detector, model):
    """Three phrases on two images, in an order of their own."""
    ids = token_ids(rng, 2, 5, 1)
    prompts = {"ids": ids, "boxes": boxes(rng, 3, 1)}
    assert_outputs(*ground_both(rng, detector, model, prompts, image_index=[1, 0, 1]))


def test_geometry_tokens(rng, detector, model):
    """Token by token: points, boxes, class token, in upstream's order where all are valid."""
    x, ids = pixels(rng, 1), token_ids(rng, 2)
    given = {
        "boxes": boxes(rng, 1, 2),
        "box_labels": np.array([[1, 0]]),
        "points": rng.uniform(0, 1, (1, 3, 2)).astype(np.float32),
        "point_labels": np.array([[1, 0, 1]]),
    }
    expected = oracle.run_detector(detector, x, ids, **given)
    level = model("encode_image", x, tracker=False).detector[-1]

    def encode(module, geo, level):
        return module.geometry(geo, level)

    tokens, mask = model.module.apply(
        {"params": model.params}, geometry(1, **given), level, method=encode
    )
    assert mask.all()
    assert_close(tokens, expected["geometry_tokens"], TINY, "geometry tokens")


def test_training_forward_with_dac(rng, detector, model):
    """All layers, one-to-one and one-to-many halves, masks of both."""
    prompts = prompts_for("text and boxes", rng)
    expected, out = ground_both(rng, detector, model, prompts, dac=True)
    assert_outputs(expected, out)
    count = CONFIG.decoder.num_queries
    assert out.layer_logits.shape[-1] == 2 * count
    assert out.pred_logits.shape[-1] == count


def test_gradients_of_box_refinement(rng, detector, model):
    """Which references are stopped shows in gradients only."""
    x, ids = pixels(rng, 1), token_ids(rng, 3)
    decoder = detector.detr_decoder
    weights = [decoder.box_head.layer3.weight, decoder.reference_points.weight]
    image = oracle.encode_image(detector, x)
    out = oracle.detect(detector, image, ids)
    layers, _, queries, _ = out["layer_boxes"].shape
    mix = rng.standard_normal((layers, 1, queries, 4)).astype(np.float32)
    loss = (out["layer_boxes"] * torch.from_numpy(mix)).sum()
    expected = torch.autograd.grad(loss, weights)

    levels = model("encode_image", x, tracker=False).detector
    text = model("encode_text", ids)
    zero = jnp.zeros(1, jnp.int32)

    def ours(decoder_params):
        params = model.params | {"decoder": decoder_params}
        args = (levels, text, geometry(1), zero, zero)
        out = model.module.apply({"params": params}, *args, method="ground")
        return (out.layer_boxes * mix).sum()

    grads = jax.jit(jax.grad(ours))(model.params["decoder"])
    kernel, reference = grads["box_head"]["layer_2"]["kernel"], grads["reference_points"]
    # Sums over all queries and layers: a few times the forward's rounding.
    assert_close(kernel.T, expected[0].numpy(), 10 * TINY, "box head")
    assert_close(reference["embedding"], expected[1].numpy(), 10 * TINY, "reference points")


CLICKS = {
    "one point": {"points": [[40.5, 60.25]], "labels": [1]},
    "points": {"points": [[40, 60], [80, 20], [5, 100]], "labels": [1, 0, 1]},
    "box": {"box": [20, 30, 90, 80]},
    "box and points": {"box": [20, 30, 90, 80], "points": [[50, 50]], "labels": [0]},
}


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize(
    ("kind", "with_mask"),
    [*itertools.product(CLICKS, (False, True)), ("nothing", True)],  # a mask alone is a prompt
)
def test_click(rng, tracker, click_model, kind, with_mask, multimask):
    given = CLICKS.get(kind, {})
    side = 4 * SIDE // CONFIG.vision.patch_size
    mask = rng.normal(0, 6, (side, side)).astype(np.float32) if with_mask else None
    x = pixels(rng, 1)
    given = {name: np.asarray(value) for name, value in given.items()}
    expected = oracle.run_click(tracker, x, mask_input=mask, multimask=multimask, **given)

    features = click_model("encode_image", x, detector=False)
    prompt = click_prompt(side, mask_input=mask, **given)
    out = click_model("click", features.tracker, prompt, np.zeros(1, np.int32))
    for name in ("masks", "iou", "tokens"):
        assert_close(getattr(out, name)[0], expected[name], TINY, name)
    np.testing.assert_allclose(out.object_logits[0], expected["object_logits"], atol=1e-3)
    masks, iou = select_masks(out, CONFIG.sam, multimask=multimask)
    assert_close(masks[0], expected["selected_masks"], TINY, "selected masks")
    np.testing.assert_allclose(iou[0], expected["selected_iou"], atol=1e-4)


def test_stability_fallback(rng):
    """A stable single mask stays; an unstable one gives way to the best of the three."""
    from sam3_jax.types import ClickOutput

    masks = np.full((2, 4, 8, 8), 5.0, np.float32)
    masks[1, 0] = 0.01  # every pixel between -delta and +delta: stability 0
    masks[:, 1:] += np.arange(3)[None, :, None, None]
    iou = np.array([[0.5, 0.1, 0.9, 0.2]] * 2, np.float32)
    out = ClickOutput(*map(jnp.asarray, (masks, iou, np.zeros(2), np.zeros((2, 4, 4)))))
    chosen, score = select_masks(out, CONFIG.sam, multimask=False)
    np.testing.assert_array_equal(chosen[:, 0, 0, 0], [5.0, 6.0])
    np.testing.assert_allclose(score[:, 0], [0.5, 0.9])

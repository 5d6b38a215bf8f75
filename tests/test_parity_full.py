"""The released size against torch: 1008 pixels, a real photograph, random weights, float32.

The first test is the one full-size pass of the quick run; the others are slow.
"""

from __future__ import annotations

import gc

import numpy as np
import pytest
from skimage import data

import oracle
from oracle.params import params_from_hf
from parity import FULL, Model, assert_close, click_prompt, geometry
from sam3_jax import config
from sam3_jax.data.images import to_model_input
from sam3_jax.models.sam_heads import select_masks
from sam3_jax.tokenizer import default_tokenizer

pytestmark = pytest.mark.optimised

CONFIG = config.sam3()
FIELDS = ("pred_logits", "pred_boxes", "presence_logits", "pred_masks", "semantic_seg", "memory")


def photograph() -> np.ndarray:
    """scikit-image's CC0 portrait of an astronaut, (1, 1008, 1008, 3)."""
    return to_model_input(data.astronaut(), (1008, 1008))[None]


@pytest.fixture(scope="module")
def detector():
    """Torch's model, its features of the photograph, ours with the same weights, its features.

    One at a time where possible: each model is 3.4 GB.
    """
    torch_model = oracle.randomize(oracle.full_detector(), seed=2)
    model = Model(CONFIG, params_from_hf(torch_model, CONFIG))
    x = photograph()
    yield (
        torch_model,
        oracle.encode_image(torch_model, x),
        model,
        model("encode_image", x, tracker=False),
    )
    del torch_model, model
    gc.collect()


def check(detector, phrases: list[str], **prompts: np.ndarray) -> None:
    torch_model, image, model, features = detector
    ids = default_tokenizer()(phrases)
    index = np.zeros(len(phrases), np.int32)
    expected = oracle.run_detector(torch_model, image, ids, image_ids=index, **prompts)
    text = model("encode_text", ids)
    valid = expected["text_mask"]
    tokens = np.asarray(text.tokens)[valid]
    assert_close(tokens, expected["text_tokens"][valid], FULL, "text")
    geo = geometry(len(phrases), **prompts)
    out = model("ground", features.detector, text, geo, index, np.arange(len(phrases)))
    for name in FIELDS:
        whole = expected[name]
        assert_close(getattr(out, name), whole, FULL, name, spread=max(1.0, float(np.ptp(whole))))
    agree = (np.asarray(out.pred_masks) > 0) == (expected["pred_masks"] > 0)
    assert agree.mean() > 0.9999


def test_features_and_text_prompt(detector):
    _, image, _, features = detector
    trunk = image.last_hidden_state.unflatten(1, (72, 72)).numpy()
    assert_close(features.trunk, trunk, FULL, "trunk")
    for i, level in enumerate(image.fpn_hidden_states[:3]):
        assert_close(features.detector[i], level.movedim(1, -1).numpy(), FULL, f"level {i}")
    check(detector, ["astronaut"])


@pytest.mark.slow
def test_text_with_boxes(detector):
    boxes = np.array([[[0.44, 0.22, 0.2, 0.3], [0.9, 0.3, 0.15, 0.5]]], np.float32)
    check(detector, ["orange suit"], boxes=boxes, box_labels=np.array([[1, 0]]))


@pytest.mark.slow
def test_box_alone(detector):
    check(detector, ["visual"], boxes=np.array([[[0.44, 0.22, 0.2, 0.3]]], np.float32))


@pytest.mark.slow
def test_interactive_head():
    """Points, a box, and refinement by the mask that the first click gave."""
    tracker = oracle.randomize(oracle.full_tracker(), seed=2)
    model = Model(CONFIG, params_from_hf(tracker, CONFIG))
    x = photograph()
    image = oracle.encode_click_image(tracker, x)
    levels = model("encode_image", x, detector=False).tracker

    def run(**prompt: np.ndarray) -> dict:
        expected = oracle.run_click(tracker, image, **prompt)
        padded = click_prompt(288, **prompt)
        out = model("click", levels, padded, np.zeros(1, np.int32))
        for name in ("masks", "iou", "tokens"):
            whole = expected[name]
            assert_close(getattr(out, name)[0], whole, FULL, name)
        masks, iou = select_masks(out, CONFIG.sam, multimask=True)
        assert_close(masks[0], expected["selected_masks"], FULL, "selected masks")
        assert_close(iou[0], expected["selected_iou"], FULL, "iou", spread=1.0)
        return expected

    first = run(points=np.array([[440.0, 220.0]]), labels=np.array([1]))
    run(box=np.array([300.0, 50.0, 640.0, 500.0]))
    best = first["low_res_logits"][first["selected_iou"].argmax()]
    points, labels = np.array([[440.0, 220.0], [900.0, 300.0]]), np.array([1, 0])
    run(points=points, labels=labels, mask_input=best)

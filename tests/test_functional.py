"""The stateless functions give what the model's methods give."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

import tiny_predictor
from parity import assert_close
from sam3_jax import functional
from sam3_jax.inference.prompts import Prompt
from sam3_jax.models.detector import empty_click
from sam3_jax.tokenizer import default_tokenizer


@pytest.fixture(scope="module")
def outputs():
    """Two images, two phrases, crosswise; and a click on the second image."""
    config, params = tiny_predictor.config(), tiny_predictor.params()
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, (2, 112, 112, 3)).astype(np.float32)
    ids = default_tokenizer()(["cup", "red car"], 32)
    index = np.array([1, 0], np.int32)
    prompt = empty_click(1, 1, (32, 32))._replace(
        points=np.full((1, 1, 2), 40, np.float32), labels=np.ones((1, 1), np.int32)
    )

    @jax.jit
    def run(params, pixels, ids, index, prompt):
        bound = {
            name: functools.partial(getattr(functional, name), config=config)
            for name in ("encode_images", "encode_texts", "ground", "click")
        }
        features = bound["encode_images"](params, pixels, tracker=True)
        text = bound["encode_texts"](params, ids)
        same = bound["ground"](params, features.detector, text)
        crossed = bound["ground"](params, features.detector, text, image_index=index)
        clicked = bound["click"](params, features.tracker, prompt, index[:1])
        return same, crossed, clicked

    return run(params, pixels, ids, index, prompt)


def test_prompts_are_about_their_images_unless_told_otherwise(outputs):
    same, crossed, _ = outputs
    assert same.pred_logits.shape == crossed.pred_logits.shape == (2, 12)
    assert np.abs(np.asarray(same.pred_masks - crossed.pred_masks)).max() > 0.1


def test_they_agree_with_the_engine(outputs):
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, (2, 112, 112, 3)).astype(np.float32)
    engine = tiny_predictor.predictor().engine
    for i, phrase in enumerate(["cup", "red car"]):
        ((out, *_),) = engine.submit(pixels[i : i + 1], [[Prompt(phrase)]], [(112, 112)], 1)
        assert_close(out.pred_masks[0], outputs[0].pred_masks[i], 2e-5, "masks")
        assert_close(out.pred_logits[0], outputs[0].pred_logits[i], 2e-5, "logits")


def test_a_click_gives_all_hypotheses(outputs):
    clicked = outputs[2]
    assert clicked.masks.shape == (1, 4, 32, 32)
    assert clicked.iou.shape == (1, 4)

"""From PyTorch's files to pictures, the way a user goes: convert, load, predict, write.

Tiny transformers models are saved, converted by the command, loaded by the predictor, and compared
with torch on a photograph; then ``infer.py`` runs on it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

import oracle
from parity import TINY, assert_close
from sam3_jax import ImagePredictor, config
from sam3_jax.convert import cli as convert_cli
from sam3_jax.data.images import to_model_input
from sam3_jax.inference import cli as infer_cli
from sam3_jax.tokenizer import default_tokenizer

SIDE = config.tiny().image_size


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "coffee.png"
    Image.fromarray(data.coffee()).save(path)  # 400 x 600
    return path


def converted(model, folder: Path) -> Path:
    """The checkpoint that the command makes of a model that transformers saved."""
    model.save_pretrained(folder / "hf")
    arguments = ["--input", str(folder / "hf"), "--output", str(folder / "jax")]
    assert convert_cli.main(arguments) == 0
    return folder / "jax"


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    model = oracle.randomize(oracle.tiny_detector(), seed=4)
    return model, converted(model, tmp_path_factory.mktemp("detector"))


def test_concepts(detector, photo):
    model, path = detector
    predictor = ImagePredictor.from_pretrained(path, dtype="float32")
    predictor.set_image(photo)
    raw = predictor.predict_raw(
        text="a cup", boxes=[[150, 60, 450, 330], [10, 10, 90, 200]], box_labels=[1, 0]
    )
    boxes = np.array(
        [[[300 / 600, 195 / 400, 0.5, 270 / 400], [50 / 600, 105 / 400, 80 / 600, 190 / 400]]]
    )
    expected = oracle.run_detector(
        model,
        to_model_input(data.coffee(), (SIDE, SIDE))[None],
        default_tokenizer()(["a cup"]),
        boxes.astype(np.float32),
        np.array([[1, 0]]),
    )
    for name in ("pred_logits", "pred_boxes", "pred_masks", "semantic_seg"):
        assert_close(getattr(raw, name), expected[name][0], TINY, name)
    np.testing.assert_allclose(raw.presence_logits, expected["presence_logits"][0], atol=1e-3)


def test_clicks(tmp_path, photo):
    model = oracle.randomize(oracle.tiny_tracker(), seed=4)
    predictor = ImagePredictor.from_pretrained(converted(model, tmp_path), dtype="float32")
    predictor.set_image(photo)
    x = to_model_input(data.coffee(), (SIDE, SIDE))[None]
    points = np.array([[310, 200], [20, 30]])
    result = predictor.predict_points(points=points, labels=[1, 0], box=[150, 60, 450, 330])
    scale = SIDE / np.array([600, 400])
    expected = oracle.run_click(
        model,
        x,
        points * scale,
        np.array([1, 0]),
        np.array([[150, 60], [450, 330]]) * scale,
    )
    assert_close(result.low_res_logits, expected["low_res_logits"], TINY, "logits")
    np.testing.assert_allclose(result.iou, expected["selected_iou"], atol=1e-4)
    assert result.masks.shape == (3, 400, 600)
    with pytest.raises(RuntimeError, match="--part image"):
        predictor.predict(text="cup")

    best = result.low_res_logits[1]
    refined = predictor.predict_points(points, [1, 0], mask_input=best, multimask=False)
    expected = oracle.run_click(
        model, x, points * scale, np.array([1, 0]), None, best, multimask=False
    )
    assert_close(refined.low_res_logits, expected["low_res_logits"], TINY, "refined")


def test_the_command(detector, photo, tmp_path, capsys):
    """Two phrases on a photograph and on a file that is none."""
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    status = infer_cli.main(
        [
            *("--checkpoint", str(detector[1]), "--input", str(photo), str(broken)),
            *("--prompt", "a cup", "a spoon", "--threshold", "0.05"),
            *("--output", str(tmp_path / "out")),
        ]
    )
    assert status == 1
    assert "broken.jpg" in capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    by_name = {Path(image["file_name"]).name: image for image in results["images"]}
    good, bad = by_name["coffee.png"], by_name["broken.jpg"]
    assert (good["width"], good["height"]) == (600, 400)
    assert "error" in bad
    assert {c["name"] for c in results["categories"]} == {"a cup", "a spoon"}
    assert results["annotations"]
    with Image.open(tmp_path / "out" / "coffee_overlay.png") as overlay:
        assert overlay.size == (600, 400)
        assert np.abs(np.asarray(overlay.convert("RGB"), int) - data.coffee()).max() > 50

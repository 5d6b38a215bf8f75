"""The demo's command, its weights, and ``infer.py`` without a checkpoint. On a toy model."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import sam3_jax
import tiny_predictor
from sam3_jax import checkpoint
from sam3_jax.checkpoint import CheckpointError
from sam3_jax.checkpoint.tree import flatten
from sam3_jax.data.annotations import load_annotations
from sam3_jax.demo import __main__ as demo
from sam3_jax.demo import bundle, coins, questions, tiles, weights
from sam3_jax.demo.objects import UNSEEN
from sam3_jax.inference import bulk, cli
from sam3_jax.inference.image import ImagePredictor
from sam3_jax.inference.postprocess import ClickResult, Detections

ROOT = Path(__file__).resolve().parents[1]
NAMES = "ring texture digit unseen count absent exemplar click coins_text coins_exemplar".split()


@pytest.fixture(scope="module")
def pictures():
    return questions.draw_pictures()


@pytest.fixture(scope="module")
def run_model(tmp_path_factory) -> Path:
    """A model as a training run leaves it, with the run's settings."""
    folder = tmp_path_factory.mktemp("run")
    source = "trained from /home/somebody/other/model"
    metadata = {"source": source, "step": 40, "run": "/home/somebody/run"}
    checkpoint.save(
        folder / "model", tiny_predictor.params(), tiny_predictor.config(), metadata=metadata
    )
    settings = {"seed": 3, "steps": 50, "batch_size": 4, "output": "/home/somebody/run"}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder / "model"


@pytest.fixture(scope="module")
def bundle_made(run_model) -> Path:
    """The toy model in half precision."""
    bundle.bundle(run_model, run_model.parent / "bundle")
    return run_model.parent / "bundle"


@pytest.fixture
def bundled(bundle_made, tmp_path, monkeypatch) -> Path:
    """The same as the package's weights."""
    monkeypatch.setattr(weights, "FOLDER", shutil.copytree(bundle_made, tmp_path / "demo_weights"))
    return weights.FOLDER


class Knowing(ImagePredictor):
    """Answers a demo question rightly; of the coins it finds two, in the corners."""

    def __init__(self, pictures):
        self.known = pictures

    def set_image(self, image):
        (picture,) = (p for p in self.known if np.array_equal(p.pixels, image))
        self.questions, (height, width) = picture.questions, image.shape[:2]
        self.corners = np.zeros((2, height, width), bool)
        self.corners[0, :20, :20] = self.corners[1, -20:, -20:] = True

    def predict(self, text=None, boxes=(), **_):
        box = next(iter(boxes), None)
        (one,) = (q for q in self.questions if (q.text, q.box) == (text, box))
        masks = self.corners if one.masks is None else one.masks
        n = len(masks)
        return Detections(masks, np.zeros((n, 4), np.float32), np.ones(n, np.float32))

    def predict_points(self, points, **_):
        (one,) = self.questions
        assert points == [one.point]
        masks = np.concatenate([~one.masks, one.masks, ~one.masks])
        logits = np.zeros((3, 4, 4), np.float32)
        return ClickResult(masks, np.array([0.2, 0.7, 0.1], np.float32), logits)


def square(start: int, side: int = 10) -> np.ndarray:
    mask = np.zeros((40, 60), bool)
    mask[5 : 5 + side, start : start + side] = True
    return mask


def question(*masks: np.ndarray, **more) -> questions.Question:
    truth = np.stack(masks) if masks else np.zeros((0, 40, 60), bool)
    return questions.Question("name", "thing", len(masks), "", truth, **more)


def test_pictures_ask_by_text_box_and_click_and_what_is_right(pictures):
    asked = {q.name: (p, q) for p in pictures for q in p.questions}
    assert tuple(asked) == tuple(NAMES)
    texts = {name: q.text for name, (_, q) in asked.items() if q.text}
    assert texts["ring"] == "yellow ring"
    assert tuple(texts["unseen"].split()[1:]) in UNSEEN
    assert asked["absent"][1].count == 0
    assert asked["count"][1].count > 12
    for name, (picture, one) in asked.items():
        prompts = [one.text is not None, one.box is not None, one.point is not None]
        assert sum(prompts) == 1
        if one.masks is None:
            assert name.startswith("coins")
            assert one.count == 24
            continue
        assert one.masks.shape == (one.count, *picture.pixels.shape[:2])
        assert one.masks.any((1, 2)).all()
    x0, y0, x1, y1 = map(int, asked["exemplar"][1].box)
    inside = asked["exemplar"][1].masks[:, y0:y1, x0:x1].sum((1, 2))
    assert (inside == asked["exemplar"][1].masks.sum((1, 2))).sum() == 1  # one object's box
    column, row = map(int, asked["click"][1].point)
    assert asked["click"][1].masks[0, row, column]


def test_outcomes_are_judged():
    right = demo.judge(question(square(5), square(30)), np.stack([square(30), square(5)]))
    assert right == demo.Result("name.png", "thing", 2, 2, 2, 1.0, True)
    # 5 of 10 columns overlap: 50 of 150 pixels.
    near = demo.judge(question(square(5), square(30)), np.stack([square(10), square(30)]))
    assert near.iou == pytest.approx((1 / 3 + 1) / 2)
    assert (near.hits, near.right) == (1, False)
    missed = demo.judge(question(square(5), square(30)), square(5)[None])
    assert (missed.found, missed.iou, missed.right) == (1, 0.5, False)
    none = np.zeros((0, 40, 60), bool)
    assert demo.judge(question(square(5)), none)[2:] == (0, 1, 0, 0.0, False)
    absent = demo.judge(question(), none)
    assert absent.right
    assert math.isnan(absent.iou)
    assert not demo.judge(question(), square(5)[None]).right
    unknown = question(square(5))._replace(masks=None)
    assert demo.judge(unknown, square(9)[None]).right  # only the number is known


def test_captions_do_not_count_what_is_wrong():
    def caption(asked: questions.Question, *found: np.ndarray) -> str:
        masks = np.stack(found) if found else np.zeros((0, 40, 60), bool)
        return demo._caption(asked, demo.judge(asked, masks))

    two = question(square(5), square(30))
    assert caption(two, square(5), square(30)) == "2 of 2"
    assert caption(two, square(5), square(45)) == "1 of 2, 1 wrong"
    assert caption(question()._replace(note="is not there")) == "none found, is not there"
    assert caption(question(), square(5)) == "1 found"
    coins = two._replace(masks=None, note="a real photograph")
    assert caption(coins, square(5)) == "1 found of 2, a real photograph"


def test_tiles_show_what_was_found():
    pixels = np.full((40, 60, 3), (200, 100, 40), np.uint8)
    tile = tiles.draw_tile(pixels, square(30)[None], question(box=(5.0, 5.0, 15.0, 15.0)), "1")
    assert tile.shape == (tiles.TILE + tiles.CAPTION, tiles.TILE, 3)
    scale, top = tiles.TILE / 60, (tiles.TILE - round(tiles.TILE / 60 * 40)) // 2
    at = [(round(x * scale), top + round(y * scale)) for x, y in ((35, 10), (50, 30), (10, 10))]
    found, other, inside_box = (tile[y, x].astype(int) for x, y in at)
    assert (found == (200, 100, 40)).all()
    assert other.mean() < 0.6 * found.mean()
    assert (inside_box == other).all()
    corner = tile[top + round(5 * scale) - 3, round(10 * scale)]
    assert tuple(corner) == tiles.MARK
    assert (tile[tiles.TILE :] < 100).any()  # the caption
    sheet = tiles.draw_overview([tile] * 3, columns=2)
    assert sheet.shape == (
        2 * len(tile) + tiles.GAP,
        2 * tiles.TILE + tiles.GAP,
        3,
    )


def test_the_demo_runs_on_the_bundled_weights(bundled, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(questions, "draw_pictures", lambda: pictures)
    loaded = []

    def load(path):
        loaded.append(path)
        return Knowing(pictures)

    monkeypatch.setattr(ImagePredictor, "from_pretrained", load)
    out = tmp_path / "demo"
    assert demo.main(["--output", str(out)]) == 0
    assert loaded == [bundled]
    made = sorted(p.relative_to(out).as_posix() for p in out.rglob("*.png"))
    inputs = [f"pictures/{p.name}.png" for p in pictures]
    assert made == sorted([*inputs, *(f"{n}.png" for n in NAMES), "overview.png"])
    text = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in text.splitlines() if ".png " in line and "|" in line]
    assert [row[0].strip() for row in rows] == [f"{name}.png" for name in NAMES]
    found, expected = ([int(row[i]) for row in rows] for i in (2, 3))
    assert expected[-3:] == [1, 24, 24]
    assert found == [*expected[:-2], 2, 2]
    assert [row[4].strip() for row in rows[-3:]] == ["1.00", "-", "-"]
    assert [row[5].strip() for row in rows] == ["yes"] * 8 + ["no"] * 2
    assert "8 of 10 answers are right" in text
    assert f"{out / 'overview.png'} shows them all" in text
    assert f"infer.py --input {out / 'pictures'} --prompt" in text
    assert f"infer.py --input {out / 'clip.mp4'} --prompt 'heart' 'crescent'" in text
    assert (out / "clip.mp4").stat().st_size > 10_000
    shown = np.asarray(Image.open(out / "pictures" / "coins.png"))
    np.testing.assert_array_equal(shown, pictures[-1].pixels)


def test_what_can_go_wrong_is_said(bundled, tmp_path, monkeypatch, capsys):
    (bundled / "config.json").unlink()
    assert demo.main(["--output", str(tmp_path / "demo")]) == 2
    assert f"error: {bundled}: the bundled demonstration weights are missing" in (
        capsys.readouterr().err
    )
    assert demo.main(["--output", str(tmp_path / "x"), "--checkpoint", str(tmp_path / "no")]) == 2
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(questions, "draw_pictures", list)
    monkeypatch.setattr(ImagePredictor, "from_pretrained", lambda path: Knowing([]))
    assert demo.main(["--output", str(tmp_path / "file"), "--checkpoint", "x"]) == 2
    assert "error: " in capsys.readouterr().err


def test_bundled_weights_are_the_models_in_half_precision(bundled, run_model, tmp_path, capsys):
    loaded, source = checkpoint.load(weights.weights_path()), checkpoint.load(run_model)
    assert loaded.config == source.config
    assert loaded.metadata == {
        "source": "trained from model",
        "step": 40,
        "seed": 3,
        "steps": 50,
        "batch_size": 4,
        "parts": ["image", "tracker"],
    }
    # float16 keeps 11 bits; below 6e-5 its steps are even.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-11, atol=3e-8),
        loaded.params,
        source.params,
    )
    written = [file.read_bytes() for file in bundled.rglob("*") if file.is_file()]
    assert not any(str(run_model.parents[1]).encode() in content for content in written)
    size = sum(map(len, written))
    assert size < 0.6 * sum(file.stat().st_size for file in run_model.rglob("*"))
    (tmp_path / "f.json").write_text(json.dumps({"figures": {"text": {"cgF1": 0.8}}}))
    arguments = [str(run_model), "--figures", str(tmp_path / "f.json"), "--part", "image", "clicks"]
    assert bundle.main([*arguments, "--output", str(bundled)]) == 0  # replaced
    assert capsys.readouterr().out.startswith(f"{bundled}: ")
    small = checkpoint.load(bundled)
    assert small.metadata["figures"] == {"text": {"cgF1": 0.8}}
    assert small.metadata["parts"] == ["image", "clicks"]
    assert "memory_encoder" not in small.params["tracker"]


def test_a_mean_of_two_models(run_model, tmp_path):
    """Of all, or of what pictures are answered with: memory stays the model's own."""
    params = checkpoint.load(run_model).params
    checkpoint.save(
        tmp_path / "other",
        jax.tree.map(lambda x: 3 * x, params),
        tiny_predictor.config(),
        metadata={"source": "trained from /home/somebody/model", "step": 7, "run": "/home/me"},
    )
    arguments = [str(run_model), "--average", str(tmp_path / "other"), "--output"]
    assert bundle.main([*arguments, str(tmp_path / "all")]) == 0
    arguments = [*arguments[:-1], "--average-part", "image", "clicks", "--output"]
    assert bundle.main([*arguments, str(tmp_path / "mean")]) == 0
    every = flatten(checkpoint.load(tmp_path / "all").params)
    mean = flatten(checkpoint.load(tmp_path / "mean").params)
    shared = flatten(checkpoint.load(run_model, parts=["image", "clicks"]).params)
    assert any(path.startswith("tracker/mask_decoder/") for path in shared)
    assert any(path.startswith("tracker/memory_encoder/") for path in mean.keys() - shared.keys())
    for path, value in flatten(params).items():
        expected = value * (2 if path in shared else 1)
        np.testing.assert_allclose(mean[path], expected, rtol=2**-11, atol=3e-8, err_msg=path)
        np.testing.assert_allclose(every[path], 2 * value, rtol=2**-11, atol=3e-8, err_msg=path)
    averaged = checkpoint.load(tmp_path / "mean").metadata["averaged"]
    assert averaged == {
        "source": "trained from model",
        "step": 7,
        "parts": ["image", "clicks"],
        "share": 0.5,
    }
    arguments = [str(run_model), "--average", str(tmp_path / "other"), "--average-share", "0.25"]
    assert bundle.main([*arguments, "--output", str(tmp_path / "quarter")]) == 0
    quarter = flatten(checkpoint.load(tmp_path / "quarter").params)
    for path, value in flatten(params).items():
        np.testing.assert_allclose(quarter[path], 1.5 * value, rtol=2**-11, atol=3e-8, err_msg=path)
    # What is not shipped is not averaged.
    arguments = [str(run_model), "--part", "image", "clicks", "--average", str(tmp_path / "other")]
    assert bundle.main([*arguments, "--output", str(tmp_path / "part")]) == 0
    part = checkpoint.load(tmp_path / "part")
    assert part.metadata["averaged"]["parts"] == part.metadata["parts"] == ["image", "clicks"]
    found = flatten(part.params)
    assert found.keys() == shared.keys()
    for path, value in shared.items():
        np.testing.assert_allclose(found[path], 2 * value, rtol=2**-11, atol=3e-8, err_msg=path)


def test_models_that_have_no_mean(run_model, tmp_path, capsys):
    params, config = checkpoint.load(run_model).params, tiny_predictor.config()
    checkpoint.save(tmp_path / "other", params, config)
    larger = dataclasses.replace(config, image_size=2 * config.image_size)
    checkpoint.save(tmp_path / "larger", params, larger)
    broken = jax.tree.map(np.copy, params)
    broken["decoder"]["query_embed"]["embedding"][0, 0] = np.nan
    checkpoint.save(tmp_path / "broken", broken, config)

    def refused(*arguments: str) -> str:
        output = tmp_path / "out"
        assert bundle.main([str(run_model), *arguments, "--output", str(output)]) == 2
        assert not output.exists()
        return capsys.readouterr().err

    assert "error: parts to average (--average-part), but no" in refused("--average-part", "image")
    assert "no such folder" in refused("--average", str(tmp_path / "none"))
    assert "between 0 and 1, got 1.0" in refused("--average-share", "1")
    said = refused("--average", str(tmp_path / "larger"))
    sizes = f"image_size is {larger.image_size}, not {config.image_size}"
    assert f"{tmp_path / 'larger'}: does not fit the model that is shipped: {sizes};" in said
    said = refused("--average", str(tmp_path / "broken"))
    assert f"{tmp_path / 'broken'}: decoder/query_embed/embedding has values that are not" in said
    arguments = ("--part", "image", "--average", str(tmp_path / "other"), "--average-part")
    said = refused(*arguments, "clicks")
    assert f"{tmp_path / 'other'}: tracker/" in said
    assert "is missing in the model that is shipped" in said
    with pytest.raises(CheckpointError, match=r"other: a has shape \(2,\), in .* it has \(3,\)"):
        bundle._mean({"a": np.zeros(3)}, {"a": np.zeros(2)}, Path("other"))


def test_what_cannot_be_bundled(run_model, tmp_path, monkeypatch, capsys):
    params = jax.tree.map(np.copy, tiny_predictor.params())
    params["scoring"]["prompt_mlp"]["fc1"]["kernel"][0, 0] = 7e4
    checkpoint.save(tmp_path / "large", params, tiny_predictor.config())
    with pytest.raises(CheckpointError, match="fc1/kernel has values that are not finite or beyon"):
        bundle.bundle(tmp_path / "large", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(bundle, "MOST", 1000)
    assert bundle.main([str(run_model), "--output", str(tmp_path / "out")]) == 2
    assert "the package may ship 1000" in capsys.readouterr().err
    assert bundle.main([str(tmp_path / "none"), "--output", str(tmp_path / "out")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_infer_without_a_checkpoint_uses_the_bundled_weights(
    bundled, tmp_path, monkeypatch, capsys
):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    loaded = []

    def load(path, dtype, resolution):
        loaded.append(path)
        return tiny_predictor.predictor().engine

    def run(engine, work, output, settings, **_):
        return bulk.Summary(len(work), 0, 0, 0, output / "results.json")

    monkeypatch.setattr(bulk, "load_engine", load)
    monkeypatch.setattr(bulk, "run", run)
    command = ["--input", str(tmp_path / "a.png"), "--prompt", "ring", "--output"]
    assert cli.main([*command, str(tmp_path / "out")]) == 0
    assert loaded == [str(bundled)]
    notes = [x for x in capsys.readouterr().err.splitlines() if x.startswith("no --checkpoint")]
    assert notes == [
        "no --checkpoint: using the bundled demonstration weights, which know coloured shapes and "
        "digits; see README.md for SAM 3's own (convert_torch_weights.py)"
    ]
    assert cli.main([*command, str(tmp_path / "out2"), "--checkpoint", "mine"]) == 0
    assert loaded[1:] == ["mine"]
    assert "bundled" not in capsys.readouterr().err
    (bundled / "config.json").unlink()
    assert cli.main([*command, str(tmp_path / "out3")]) == 2
    error = capsys.readouterr().err
    assert "error: no --checkpoint DIR, and" in error
    assert "weights are missing" in error
    assert not (tmp_path / "out3").exists()


def test_help_comes_at_once():
    code = "import sys, runpy; sys.argv[1:] = ['--help']\ntry: runpy.run_module('sam3_jax.demo', "
    code += "run_name='__main__')\nfinally: print('jax' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
    assert "overview.png" in done.stdout


def test_ten_pictures_of_coins(tmp_path, capsys):
    assert coins.main([str(tmp_path / "coins")]) == 0
    files = [Path(line) for line in capsys.readouterr().out.split()]
    assert [file.parent.name for file in files] == ["train", "valid"]
    for file in files:
        dataset = load_annotations([file])
        assert not dataset.problems.found
        content = json.loads(file.read_text())
        assert len(content["images"]) == len(list(file.parent.glob("*.png"))) == 10
        shown = {annotation["image_id"] for annotation in content["annotations"]}
        assert shown == set(range(8))  # the last two show grass and gravel
    assert coins.main([str(tmp_path / "coins")]) == 2
    assert "choose another folder" in capsys.readouterr().err


def test_bundled_clicks_alone_do_not_follow_videos(run_model, tmp_path):
    bundle.bundle(run_model, tmp_path / "weights", parts=["image", "clicks"])
    with pytest.raises(RuntimeError, match=r"no weights for this \(tracker/memory_encoder\)"):
        sam3_jax.VideoPredictor.from_pretrained(tmp_path / "weights")

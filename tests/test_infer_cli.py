"""The command ``infer.py``: arguments, files, failures. On a tiny model that is made here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import skimage.data
from pycocotools.coco import COCO

import tiny_predictor
from sam3_jax import checkpoint
from sam3_jax.checkpoint import CheckpointError
from sam3_jax.inference import batch, cli, files
from sam3_jax.inference.image import ImagePredictor

ROOT = Path(__file__).resolve().parents[1]


BOXES = [(30.0, 20.0, 120.0, 90.0), (10.0, 10.0, 40.0, 40.0)]
BOX_ARGUMENTS = ("--box", "30,20,120,90", "--box", "10,10,40,40,-")


@pytest.fixture
def predictor() -> ImagePredictor:
    return tiny_predictor.predictor()


@pytest.fixture
def run(predictor, monkeypatch, tmp_path):
    """Runs the command on the tiny model, writing to ``tmp_path / "out"``."""
    monkeypatch.setattr(ImagePredictor, "from_pretrained", lambda path, dtype: predictor)

    def call(*arguments: str | Path) -> int:
        common = ["--checkpoint", "somewhere", "--output", str(tmp_path / "out")]
        return cli.main([*common, *map(str, arguments)])

    return call


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two pictures of the same name in two folders, and one that is damaged."""
    folder = tmp_path / "photos"
    for sub, pixels in (("a", skimage.data.coffee()), ("b", skimage.data.chelsea())):
        (folder / sub).mkdir(parents=True)
        PIL.Image.fromarray(pixels[::3, ::3]).save(folder / sub / "photo.jpg")
    whole = (folder / "a" / "photo.jpg").read_bytes()
    (folder / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    return folder


def results(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out" / "results.json").read_text())


def test_pictures_become_overlays_and_results(run, photos, tmp_path, capsys, predictor):
    a, b = photos / "a" / "photo.jpg", photos / "b" / "photo.jpg"
    arguments = ("--prompt", "cup", "cat", "cup", "--prompt", "rug", "--threshold", "0.05")
    assert run("--input", a, b, *arguments, *BOX_ARGUMENTS) == 0
    data = results(tmp_path)
    assert [image["file_name"] for image in data["images"]] == [a.as_posix(), b.as_posix()]
    assert [c["name"] for c in data["categories"]] == ["cup", "cat", "rug"]
    assert data["info"]["threshold"] == 0.05
    names = [image["overlay"] for image in data["images"]]
    assert names == ["photo_overlay.png", "photo_2_overlay.png"]
    for image, name in zip(data["images"], names, strict=True):
        drawn = PIL.Image.open(tmp_path / "out" / name)
        assert drawn.size == (image["width"], image["height"])
    out = capsys.readouterr().out
    assert f"2 of 2 pictures, {len(data['annotations'])} instances" in out

    # The file holds what the predictor finds.
    predictor.set_image(b)
    found = predictor.predict("cat", BOXES, [1, 0], threshold=0.05)
    coco = COCO(str(tmp_path / "out" / "results.json"))
    stored = coco.loadAnns(coco.getAnnIds(imgIds=2, catIds=2))
    assert len(stored) == len(found.scores) > 0
    np.testing.assert_array_equal([coco.annToMask(s) for s in stored], found.masks)
    np.testing.assert_allclose([s["score"] for s in stored], found.scores, atol=1e-6)  # rounded


def test_a_broken_picture_does_not_end_the_run(run, photos, tmp_path, capsys):
    a, b = photos / "a" / "photo.jpg", photos / "b" / "photo.jpg"
    broken, missing = photos / "broken.jpg", photos / "missing.jpg"
    assert run("--input", broken, a, missing, b, "--prompt", "cat") == 1
    data = results(tmp_path)
    assert [image["status"] for image in data["images"]] == ["error", "ok", "error", "ok"]
    assert "truncated" in data["images"][0]["error"]
    assert "no such file" in data["images"][2]["error"]
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    captured = capsys.readouterr()
    for file in (broken, missing):
        (line,) = [x for x in captured.err.splitlines() if x.startswith(f"failed: {file}")]
        assert "Traceback" not in line
    assert "2 of 4 pictures" in captured.out
    assert "2 failed" in captured.err


def test_boxes_alone_search_for_what_they_show(run, photos, tmp_path, predictor):
    a = photos / "a" / "photo.jpg"
    assert run("--input", a, *BOX_ARGUMENTS, "--threshold", "0") == 0
    data = results(tmp_path)
    assert [c["name"] for c in data["categories"]] == ["visual"]
    assert data["info"]["boxes"] == [[30, 20, 120, 90, "+"], [10, 10, 40, 40, "-"]]
    predictor.set_image(a)
    found = predictor.predict(boxes=BOXES, box_labels=[1, 0], threshold=0.0)
    np.testing.assert_allclose([s["score"] for s in data["annotations"]], found.scores, atol=1e-6)


def test_a_box_outside_one_picture_fails_that_picture(run, photos, tmp_path):
    big = tmp_path / "big.png"
    PIL.Image.fromarray(skimage.data.astronaut()).save(big)
    files_ = ("--input", photos / "a" / "photo.jpg", big)
    assert run(*files_, "--prompt", "x", "--box", "400,300,500,400", "9,9,500,400") == 1
    data = results(tmp_path)
    assert [image["status"] for image in data["images"]] == ["error", "ok"]
    assert "outside the image" in data["images"][0]["error"]


def test_an_interrupted_run_keeps_what_was_done(run, photos, tmp_path, monkeypatch, capsys):
    a, b = photos / "a" / "photo.jpg", photos / "b" / "photo.jpg"
    load = batch.load_image

    def stop_at_b(file):
        if file == b:
            raise KeyboardInterrupt
        return load(file)

    monkeypatch.setattr(batch, "load_image", stop_at_b)
    assert run("--input", a, b, "--prompt", "cat") == 130
    assert [image["file_name"] for image in results(tmp_path)["images"]] == [a.as_posix()]
    assert "interrupted" in capsys.readouterr().err


def test_results_that_cannot_be_written(run, photos, monkeypatch, capsys):
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    assert run("--input", photos / "a" / "photo.jpg", "--prompt", "cat") == 1
    assert "cannot write the results: disk full" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "x.jpg"], "say what to look for"),
        (["--input", "x.jpg", "--prompt", " "], "empty phrase"),
        (["--input", "x.jpg", "--prompt", "a", "--box", "1,2,3"], "'1,2,3' is not x0,y0,x1,y1"),
        (["--input", "x.jpg", "--prompt", "a", "--box", "1,2,3,4,x"], "is not x0,y0,x1,y1"),
        (["--input", "x.jpg", "--prompt", "a", "--threshold", "2"], "not a number from 0 to 1"),
        (["--input", "x.jpg", "--prompt", "a", "--threshold", "high"], "not a number from 0"),
        (["--input", "x.jpg", "--prompt", "a", "--dtype", "float16"], "invalid choice"),
        (["--prompt", "a"], "--input"),
        (["--input", ".", "--prompt", "a"], "no pictures in the folder ."),
    ],
)
def test_mistakes_are_explained(run, arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    try:
        status = run(*arguments)
    except SystemExit as stop:  # argparse's own
        status = stop.code
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_bad_checkpoint_and_a_bad_output_folder(photos, tmp_path, monkeypatch, capsys):
    def refuse(path, dtype):
        raise CheckpointError(f"{path}: no checkpoint here")

    monkeypatch.setattr(ImagePredictor, "from_pretrained", refuse)
    arguments = ["--checkpoint", "c", "--input", str(photos / "a"), "--prompt", "a", "--output"]
    assert cli.main([*arguments, str(tmp_path / "out")]) == 2
    assert "error: c: no checkpoint here" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli.main([*arguments, str(tmp_path / "file")]) == 2
    assert "cannot make the folder" in capsys.readouterr().err


def test_folders_are_read_in_order_without_overlays_and_each_file_once(tmp_path):
    for name in ("b.JPG", "a.png", "notes.txt", "a_overlay.png"):
        (tmp_path / name).write_bytes(b"")
    found = files.expand_inputs([tmp_path / "b.JPG", tmp_path, tmp_path / "other"])
    assert [file.name for file in found] == ["b.JPG", "a.png", "other"]


def test_overlay_names_never_collide():
    stems = ["a/x.png", "b/x.jpg", "c/x_2.jpg", "d/X.jpg", "e/y.png"]
    names = list(files.overlay_names([Path(s) for s in stems]))
    assert names[:2] == ["x_overlay.png", "x_2_overlay.png"]
    assert len({name.lower() for name in names}) == len(stems)


def test_help_comes_at_once_and_teaches():
    code = "import sys, runpy; sys.argv[1:] = ['--help']\ntry: runpy.run_path('infer.py', {}, "
    code += "'__main__')\nfinally: print('jax' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
    assert "examples:" in done.stdout
    assert '--prompt "cat"' in done.stdout


def test_the_program_runs_from_a_checkpoint(photos, tmp_path):
    """Nothing replaced: a saved checkpoint, a process of its own, every exit status."""
    checkpoint.save(tmp_path / "ckpt", tiny_predictor.params(), tiny_predictor.config())
    command = [sys.executable, "infer.py", "--checkpoint", tmp_path / "ckpt", "--prompt", "cup"]
    command += ["--threshold", "0.02", "--output", tmp_path / "out", "--input", photos / "a"]

    def run(*more: str | Path) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True)

    done = run(photos / "broken.jpg")
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("1 of 2 pictures, ")
    assert "failed: " in done.stderr
    assert "Traceback" not in done.stderr
    predictor = tiny_predictor.predictor()
    predictor.set_image(photos / "a" / "photo.jpg")
    found = predictor.predict("cup", threshold=0.02)
    stored = results(tmp_path)["annotations"]
    np.testing.assert_allclose([s["score"] for s in stored], found.scores, atol=1e-5)
    assert run("--dtype", "float16").returncode == 2

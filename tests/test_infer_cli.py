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
from infer_command import caller
from sam3_jax import checkpoint
from sam3_jax.checkpoint import CheckpointError
from sam3_jax.inference import cli, files, pipeline, rle
from sam3_jax.inference.engine import Engine
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
    return caller(predictor.engine, monkeypatch, tmp_path / "out")


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
    names = [image["outputs"][0] for image in data["images"]]
    assert names == ["a_photo_overlay.png", "b_photo_overlay.png"]
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
    assert data["images"][0]["error"].startswith("cannot be decoded, it may be truncated")
    assert "no such file" in data["images"][2]["error"]
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    captured = capsys.readouterr()
    for file in (broken, missing):
        (line,) = [x for x in captured.err.splitlines() if x.startswith(f"failed: {file}")]
        assert "Traceback" not in line
    assert "2 of 4 pictures" in captured.out
    assert "2 failed" in captured.err


def test_how_large_pictures_may_be(run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", PIL.Image.MAX_IMAGE_PIXELS)  # put back later
    big = tmp_path / "big.png"
    PIL.Image.new("1", (1100, 1000)).save(big)
    files_ = ("--input", big, photos / "a" / "photo.jpg", "--prompt", "x")
    assert run(*files_, "--max-megapixels", "1") == 1
    data = results(tmp_path)
    assert [image["status"] for image in data["images"]] == ["error", "ok"]
    assert "allow more with --max-megapixels" in data["images"][0]["error"]
    assert run(*files_, "--max-megapixels", "0", "--overwrite") == 0


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


def test_an_interrupted_run_keeps_what_was_done_and_goes_on(
    run, photos, tmp_path, monkeypatch, capsys
):
    a, b = photos / "a" / "photo.jpg", photos / "b" / "photo.jpg"
    finish = pipeline.finish_ahead

    def stop_after_one(*args):
        yield next(finish(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "finish_ahead", stop_after_one)
    assert run("--input", a, b, "--prompt", "cat") == 130
    assert [image["file_name"] for image in results(tmp_path)["images"]] == [a.as_posix()]
    assert "interrupted" in capsys.readouterr().err
    (tmp_path / "out" / "a_photo_overlay.png").unlink()

    monkeypatch.setattr(pipeline, "finish_ahead", finish)
    assert run("--input", a, b, "--prompt", "cat") == 0
    names = [image["file_name"] for image in results(tmp_path)["images"]]
    assert names == [a.as_posix(), b.as_posix()]
    assert "2 of 2 pictures (1 done before)" in capsys.readouterr().out
    assert not (tmp_path / "out" / "a_photo_overlay.png").exists()  # was not done again
    assert (tmp_path / "out" / "b_photo_overlay.png").exists()


def test_other_settings_do_not_mix_with_what_is_there(run, photos, tmp_path, capsys):
    a = photos / "a" / "photo.jpg"
    assert run("--input", a, "--prompt", "cat") == 0
    assert run("--input", a, "--prompt", "cat", "--threshold", "0.1") == 2
    error = capsys.readouterr().err
    assert "threshold was 0.5, is 0.1" in error
    assert "--overwrite" in error
    assert run("--input", a, "--prompt", "cat", "--threshold", "0.1", "--overwrite") == 0
    assert results(tmp_path)["info"]["threshold"] == 0.1


def test_results_that_cannot_be_written(run, photos, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert run("--input", photos / "a" / "photo.jpg", "--prompt", "cat") == 1
    assert "cannot write the results: " in capsys.readouterr().err


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
        (["--prompt", "a"], "say which pictures"),
        (["--input", "x.jpg", "--prompt", "a", "--point", "1,2"], "use one kind"),
        (["--input", "x.jpg", "--point", "1,2,3"], "is not x,y in pixels"),
        (["--input", "x.jpg", "--everything", "--prompt", "a"], "takes no prompts"),
        (["--input", "x.jpg", "--prompt", "a", "--jobs", "y"], "leave out --input"),
        (["--jobs", "no-such-file.jsonl"], "cannot read the job file"),
        (["--input", "x.jpg", "--prompt", "a", "--shard", "4/4"], "I from 0 to N-1"),
        (["--input", "x.jpg", "--prompt", "a", "--nms", "box"], "invalid choice"),
        (["--input", "x.jpg", "--prompt", "a", "--batch-size", "-1"], "not a whole number"),
        (["--merge"], "no results in"),
        (["--input", ".", "--prompt", "a"], "no pictures or videos in the folder ."),
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
    def refuse(path, **_):
        raise CheckpointError(f"{path}: no checkpoint here")

    monkeypatch.setattr(Engine, "from_pretrained", refuse)
    arguments = ["--checkpoint", "c", "--input", str(photos / "a"), "--prompt", "a", "--output"]
    assert cli.main([*arguments, str(tmp_path / "out")]) == 2
    assert "error: c: no checkpoint here" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli.main([*arguments, str(tmp_path / "file")]) == 2
    assert "cannot make the folder" in capsys.readouterr().err
    assert cli.main(arguments[2:-1]) == 2
    assert "--output DIR" in capsys.readouterr().err


def test_folders_are_read_in_order_without_overlays_and_each_file_once(tmp_path):
    for name in ("b.JPG", "a.png", "notes.txt", "a_overlay.png"):
        (tmp_path / name).write_bytes(b"")
    found = files.expand_inputs([tmp_path / "b.JPG", tmp_path, tmp_path / "other"])
    assert [file.name for file in found] == ["b.JPG", "a.png", "other"]


def test_a_job_file_gives_every_picture_its_own_prompts(run, photos, tmp_path, capsys, predictor):
    """Concepts and clicks, thresholds, and a line that is no job."""
    PIL.Image.fromarray(np.full((134, 200), 255, np.uint8)).save(photos / "mask.png")
    lines = [
        {"image": "a/photo.jpg", "phrases": ["cup", "cat"], "threshold": 0.03},
        {"image": "b/photo.jpg", "points": [[50, 40]]},
        {"image": "b/photo.jpg", "points": [[50, 40], [90, 80]], "point_labels": [1, 0]},
        {"image": "a/photo.jpg", "object_box": [20, 10, 90, 80]},
        {"image": "a/photo.jpg", "points": [[5000, 10]]},
        {"image": "a/photo.jpg", "mask_prompt": "mask.png"},
        {"image": "a/photo.jpg", "boxes": [[20, 10, 90, 80]], "threshold": 0},
    ]
    file = photos / "jobs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + "nonsense\n")
    assert run("--jobs", file, "--batch-size", "2") == 1
    data = results(tmp_path)
    assert [i["status"] for i in data["images"]] == ["ok"] * 4 + ["error"] + ["ok"] * 2 + ["error"]
    assert "points must lie on the image" in data["images"][4]["error"]
    assert data["images"][7]["error"].startswith("line 8: not a JSON object")
    assert "5 of" not in capsys.readouterr().out
    assert {c["name"] for c in data["categories"]} == {"cup", "cat", "object", "visual"}

    def scores(image: int) -> list[float]:
        return [a["score"] for a in data["annotations"] if a["image_id"] == image]

    predictor.set_image(photos / "a" / "photo.jpg")
    cups, cats = predictor.predict(["cup", "cat"], threshold=0.03)
    np.testing.assert_allclose(scores(1), [*cups.scores, *cats.scores], atol=1e-5)
    box = predictor.predict_points(box=[20, 10, 90, 80], multimask=False)
    np.testing.assert_allclose(scores(4), box.iou, atol=1e-5)
    predictor.set_image(photos / "b" / "photo.jpg")
    click = predictor.predict_points([[50, 40]])
    np.testing.assert_allclose(scores(2), click.iou.max(), atol=1e-5)
    (stored,) = [a for a in data["annotations"] if a["image_id"] == 2]
    np.testing.assert_array_equal(
        rle.decode_mask(stored["segmentation"]), click.masks[click.iou.argmax()]
    )


def test_every_output_that_can_be_asked_for(run, photos, tmp_path):
    a = photos / "a" / "photo.jpg"
    wanted = ("--masks", "--semantic", "--labelme", "--yolo", "--no-overlay")
    assert run("--input", a, "--prompt", "cup", "--threshold", "0.03", *wanted) == 0
    (image,) = results(tmp_path)["images"]
    assert image["outputs"] == [
        "photo_masks",
        "photo_semantic",
        "labelme/photo.json",
        "yolo/photo.txt",
    ]
    count = len(results(tmp_path)["annotations"])
    assert len(list((tmp_path / "out" / "photo_masks").iterdir())) == count > 0
    assert (tmp_path / "out" / "yolo" / "classes.txt").read_text() == "cup\n"
    probability = PIL.Image.open(tmp_path / "out" / "photo_semantic" / "000_cup.png")
    assert probability.size == (image["width"], image["height"])
    assert not list((tmp_path / "out").glob("*_overlay.png"))


def test_batches_do_not_change_results(run, photos, tmp_path):
    """Three pictures in batches of two, with different numbers of instances kept."""
    files_ = [photos / "a" / "photo.jpg", photos / "b" / "photo.jpg", photos / "c.png"]
    PIL.Image.fromarray(skimage.data.astronaut()[::4, ::4]).save(files_[2])
    common = ("--input", *files_, "--prompt", "cup", "cat", "--threshold", "0.03", "--no-overlay")
    assert run(*common) == 0
    alone = results(tmp_path)["annotations"]
    assert run(*common, "--batch-size", "2", "--overwrite") == 0
    together = results(tmp_path)["annotations"]
    assert len(alone) == len(together) > 3
    for a, b in zip(alone, together, strict=True):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)
        masks = [rle.decode_mask(x["segmentation"]) for x in (a, b)]
        assert (masks[0] != masks[1]).mean() < 1e-3


def test_settings_that_thin_out(run, photos, tmp_path):
    common = ("--input", photos / "a" / "photo.jpg", "--prompt", "cup", "--threshold", "0")

    def found(*more: str) -> list[dict]:
        assert run(*common, "--no-overlay", "--overwrite", *more) == 0
        return results(tmp_path)["annotations"]

    everything = found()
    assert len(everything) == 12
    assert len(found("--max-instances", "3")) == 3
    assert 0 < len(found("--nms", "iou", "--nms-threshold", "0.1")) < 12
    louder = found("--no-presence")
    assert louder[0]["score"] > everything[0]["score"]
    for tight in found("--boxes", "masks"):
        mask = rle.decode_mask(tight["segmentation"])
        rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows):
            size = [cols[-1] + 1 - cols[0], rows[-1] + 1 - rows[0]]
            assert tight["bbox"] == [cols[0], rows[0], *size]


def test_tiles_and_everything(run, photos, tmp_path):
    a = photos / "a" / "photo.jpg"
    assert run("--input", a, "--prompt", "cup", "--threshold", "0.03", "--tile", "128") == 0
    (image,) = results(tmp_path)["images"]
    assert image["status"] == "ok"
    size = [image["height"], image["width"]]
    assert all(x["segmentation"]["size"] == size for x in results(tmp_path)["annotations"])
    arguments = ("--input", a, "--box", "20,10,90,80", "--tile", "128", "--overwrite")
    assert run(*arguments) == 1
    assert "boxes do not go with tiles" in results(tmp_path)["images"][0]["error"]
    assert run("--input", a, "--everything", "--points-per-side", "2", "--overwrite") == 0
    assert [c["name"] for c in results(tmp_path)["categories"]] == ["object"]


def test_shards_do_each_their_part(run, photos, tmp_path, capsys):
    """Two processes one after the other; a third command merges. Bad pictures are in it."""
    common = ("--input", photos, "--recursive", "--prompt", "cat", "--no-overlay")
    assert run(*common, "--shard", "0/2") == 1  # the first and the third: a and broken.jpg
    assert "results-00000-of-00002.jsonl" in capsys.readouterr().out
    assert not (tmp_path / "out" / "results.json").exists()
    assert run(*common, "--shard", "1/2") == 0
    assert run("--merge") == 0
    assert [i["status"] for i in results(tmp_path)["images"]] == ["ok", "ok", "error"]
    COCO(str(tmp_path / "out" / "results.json"))
    assert "results.json" in capsys.readouterr().out


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

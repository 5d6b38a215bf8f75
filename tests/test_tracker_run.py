"""A run that trains the tracker: from videos on disk to a model, and on after an interruption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import film_files
import tiny_clips
from sam3_jax import checkpoint
from sam3_jax.checkpoint.tree import flatten
from sam3_jax.data.records import AnnotationError
from sam3_jax.trainer.clip_validation import ClipValidator
from sam3_jax.trainer.config import SplitConfig, TrainConfig, ValidationConfig, check_name
from sam3_jax.trainer.logs import read_log
from sam3_jax.trainer.loop import train
from sam3_jax.trainer.start import RunError
from sam3_jax.trainer.tasks import task_of
from sam3_jax.training.optimizer import tracking

STEPS = 3


def write_davis(folder: Path, names: tuple[str, ...] = ("one", "two"), frames: int = 4) -> Path:
    """The moving and the still block as objects 1 and 2."""
    for name in names:
        for part in ("JPEGImages", "Annotations"):
            (folder / part / name).mkdir(parents=True)
        for i in range(frames):
            labels = np.zeros(film_files.SIZE, np.uint8)
            for label, mask in enumerate(film_files.truth(i), 1):
                if mask is not None:
                    labels[mask] = label
            Image.fromarray(labels).save(folder / "Annotations" / name / f"{i:05d}.png")
            picture = Image.fromarray(film_files.picture(i))
            picture.save(folder / "JPEGImages" / name / f"{i:05d}.jpg")
    return folder


def config_of(folder: Path, output: Path) -> TrainConfig:
    config = TrainConfig(task="tracker", output=str(output), steps=STEPS, batch_size=1)
    config.model = tiny_clips.model_config()
    config.optimizer = tracking()
    config.optimizer.schedule.warmup = 1
    config.init.checkpoint = str(folder / "weights")
    config.train.annotations = str(folder / "videos" / "instances.json")
    config.valid.annotations = str(folder / "davis")
    clips = config.clips
    clips.frames, clips.objects, clips.resolution, clips.mask_size = 3, 2, 112, 32
    config.tracker.prompting.corrections = 1
    config.step.dtype = "float32"
    config.mesh.data, config.mesh.tensor = 1, 1
    config.log.every, config.log.tensorboard = 1, False
    config.checkpoint.every, config.checkpoint.keep, config.checkpoint.best = 1, STEPS, "J&F"
    config.validation.images = 1
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tracker")
    film_files.write_ytvis(folder / "videos")
    write_davis(folder / "davis")
    return folder


def test_mistakes_are_named(folder, tmp_path):
    config = config_of(folder, tmp_path / "run")
    config.task = "clips"
    with pytest.raises(RunError, match="task='clips': choose one of pictures, contrast, tracker"):
        task_of(config)
    config.task, config.train.annotations = "tracker", ""
    with pytest.raises(RunError, match="YouTube-VIS JSON"):
        task_of(config).prepare()
    settings = (ValidationConfig(), config.model)
    split = SplitConfig(str(folder / "videos"))
    with pytest.raises(AnnotationError, match="as DAVIS has"):
        ClipValidator(split, *settings, dtype="float32", folder=tmp_path)
    shutil.copytree(folder / "davis" / "Annotations", tmp_path / "alone")
    split = SplitConfig(str(tmp_path / "alone"))
    with pytest.raises(AnnotationError, match="frames are not beside"):
        ClipValidator(split, *settings, dtype="float32", folder=tmp_path)
    assert check_name("tracker.prompting.second_prompt") is None
    assert check_name("clips.max_stride") is None


def test_pictures_are_no_videos(folder, tmp_path):
    """A folder that was written for the image model is refused."""
    import data_sets
    from sam3_jax.data.builder import Source, prepare

    data_sets.write_pictures(tmp_path)
    file = data_sets.write_json(tmp_path / "coco.json", data_sets.coco())
    config = config_of(folder, tmp_path / "run")
    config.data.folder = str(prepare({"train": Source(file)}, tmp_path / "data", "pictures"))
    task = task_of(config)
    with pytest.raises(AnnotationError, match="holds pictures, the tracker trains on videos"):
        task.count(task.prepare())


@pytest.mark.slow
def test_a_run_and_one_that_was_interrupted_end_alike(folder, tmp_path, monkeypatch):
    import jax

    # The mesh of tests has eight devices, and the run is one of a single device.
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
    model = tiny_clips.model_config()
    checkpoint.save(folder / "weights", tiny_clips.params(model), model)
    whole = tmp_path / "whole"
    finished = train(config_of(folder, whole))
    assert (finished.step, finished.complete) == (STEPS, True)
    assert 0 <= finished.figures["J&F"] <= 1
    lines = read_log(whole / "log.jsonl")
    losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}
    assert sorted(losses) == [1, 2, 3]
    metrics = json.loads((whole / "validation" / f"step_{STEPS:08d}" / "metrics.json").read_text())
    assert sorted(metrics["objects"]) == ["one/1", "one/2"]

    # What a run leaves that was stopped after its first step.
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    for path in (cut / "states" / "2", cut / "states" / "3", cut / "model"):
        shutil.rmtree(path)
    train(config_of(folder, cut))
    resumed = {line["step"]: line["loss"] for line in read_log(cut / "log.jsonl") if "loss" in line}
    assert resumed == losses
    ours, theirs = (flatten(checkpoint.load(run / "model").params) for run in (cut, whole))
    before = flatten(checkpoint.load(folder / "weights").params)
    for path, value in theirs.items():
        np.testing.assert_array_equal(ours[path], value, err_msg=path)
        frozen = not path.startswith(("tracker/", "vision/tracker_neck/"))
        assert np.array_equal(value, before[path]) or not frozen, path

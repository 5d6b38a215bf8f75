"""Validation during training: the figures of ``evaluate.py``, one compilation, failures."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

import data_sets
import tiny_predictor
from sam3_jax import sharding
from sam3_jax.checkpoint.tree import flatten
from sam3_jax.data.records import AnnotationError, Answer, Instance, Record
from sam3_jax.evaluation import cli
from sam3_jax.inference.image import ImagePredictor
from sam3_jax.trainer import validation
from sam3_jax.trainer.config import SplitConfig, ValidationConfig
from sam3_jax.trainer.validation import Validator, gather_params

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ValidationConfig(threshold=0.03, pictures=5)  # random weights score low


@pytest.fixture
def split(tmp_path) -> SplitConfig:
    """Three pictures with seven categories."""
    folder = tmp_path / "photos"
    folder.mkdir()
    data_sets.write_pictures(folder)
    return SplitConfig(str(data_sets.write_json(folder / "coco.json", data_sets.coco())))


def make(split: SplitConfig, folder: Path, **changes) -> Validator:
    """A validator that shares its compiled programs with other tests."""
    config = dataclasses.replace(CONFIG, **changes)
    validator = Validator(split, config, tiny_predictor.config(), dtype="float32", folder=folder)
    validator.engine.run = tiny_predictor.predictor().engine.run
    return validator


@pytest.fixture
def compilations():
    """Grows with every program that is compiled."""
    seen: list[str] = []

    def listen(event: str, duration: float, **_) -> None:
        if event.endswith("backend_compile_duration"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def test_the_figures_are_those_of_evaluate(split, tmp_path, monkeypatch):
    validator, params = make(split, tmp_path / "run"), tiny_predictor.params()
    found = validator.run(params, 100)
    folder = tmp_path / "run" / "validation" / "step_00000100"

    monkeypatch.setattr(
        ImagePredictor, "from_pretrained", lambda path, dtype: tiny_predictor.predictor()
    )
    command = ["--gt", split.annotations, "--checkpoint", "x", "--threshold", "0.03"]
    command += ["--min-score", "0.03", "--gallery", "0", "--output", str(tmp_path / "out")]
    assert cli.main(command) == 0
    ours, theirs = (
        json.loads((f / "metrics.json").read_text()) for f in (folder, tmp_path / "out")
    )
    assert ours["metrics"] == theirs["metrics"]
    assert ours["info"]["step"] == 100
    numbers = {k: v for k, v in found.figures.items() if not np.isnan(v)}
    assert numbers == {k: v for k, v in ours["metrics"].items() if v is not None}
    assert numbers["bbox/AP50"] > 0 < numbers["mIoU"]
    for name in ("phrases.csv", "pairs.csv", "metrics.md"):
        assert (folder / name).read_text() == (tmp_path / "out" / name).read_text()
    ours, theirs = (
        json.loads((f / "predictions.json").read_text()) for f in (folder, tmp_path / "out")
    )
    assert ours["annotations"] == theirs["annotations"] != []
    assert ours["images"] == theirs["images"]

    # Face, cup, saucer and cat are there; of what is not there comes the first.
    names = [name for name, _ in found.pictures]
    assert names == ["00_face", "01_Cup", "02_saucer", "03_cat", "04_Cup"]
    for name, pixels in found.pictures:
        np.testing.assert_array_equal(np.asarray(PIL.Image.open(folder / f"{name}.png")), pixels)
    assert found.failed == {}
    assert list(folder.parent.iterdir()) == [folder]


def test_other_parameters_without_compiling_anew(split, tmp_path, compilations):
    """Phrases too: those that the old parameters encoded are forgotten."""
    validator, params = make(split, tmp_path), tiny_predictor.params()
    first = validator.run(params, 1)
    assert validator.engine.params == {}  # the memory is training's again
    compilations.clear()
    other = {**params, "text": jax.tree.map(lambda x: x[::-1], params["text"])}
    second, again = validator.run(other, 2), validator.run(params, 2)
    assert compilations == []
    jax.jit(lambda x: x + 1)(np.float32(1))
    assert compilations  # they would be heard of
    assert flat(again.figures) == flat(first.figures) != flat(second.figures)
    assert sorted(path.name for path in (tmp_path / "validation").iterdir()) == [
        "step_00000001",
        "step_00000002",
    ]


def flat(figures: dict[str, float]) -> str:
    return json.dumps(figures)  # in which nan equals nan


def test_bad_pictures_are_counted(split, tmp_path, capsys):
    folder = Path(split.annotations).parent
    (folder / "cup.jpg").write_bytes(b"not a picture")
    (folder / "cat.png").unlink()
    split.max_bad = 0.5
    found = make(split, tmp_path, pictures=8).run(tiny_predictor.params(), 5)
    assert set(found.failed) == {"cup.jpg", "cat.png"}
    assert "no such file" in found.failed["cat.png"]
    error = capsys.readouterr().err
    assert "failed: cup.jpg: " in error
    data = json.loads((tmp_path / "validation/step_00000005/metrics.json").read_text())
    assert set(data["problems"]["failed_pictures"]) == {"cup.jpg", "cat.png"}
    assert data["pairs"]["scored_by_cgF1"] == 7
    # The cup's pairs and the cats' cannot be drawn; the others keep their names.
    names = [name for name, _ in found.pictures]
    assert names[0] == "00_face"
    assert not {"01_Cup", "02_saucer", "03_cat"} & set(names)


def test_not_even_one_picture(split, tmp_path, monkeypatch):
    """Also what the device says when memory runs out ends no training."""

    def full(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 3 GB")

    validator = make(split, tmp_path)
    monkeypatch.setattr(ImagePredictor, "set_image", full)
    found = validator.run(tiny_predictor.params(), 5)
    assert set(found.failed.values()) == {"RESOURCE_EXHAUSTED: Out of memory"}
    assert len(found.failed) == 3
    assert found.figures["segm/cgF1"] == 0


def test_the_first_pictures_alone(split, tmp_path):
    validator = make(split, tmp_path, images=2, negatives=False)
    assert [r.phrase for r in validator.dataset.records] == ["face", "Cup", "saucer"]
    (Path(split.annotations).parent / "cat.png").unlink()
    make(split, tmp_path, images=2)  # nobody misses it
    with pytest.raises(AnnotationError, match=r"missing pictures.*cat\.png"):
        make(split, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": ""}, r"no validation data: give --config\.valid\.annotations"),
        ({"annotations": "none.json"}, r"none\.json: cannot be read"),
        ({"images": "nowhere"}, r"nowhere: no such folder; set --config\.valid\.images"),
        ({"images": "."}, "missing pictures"),
    ],
)
def test_bad_paths_show_before_training(split, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AnnotationError, match=message):
        make(dataclasses.replace(split, **change), tmp_path)


def test_samples_are_spread():
    box = Instance((0.0, 0.0, 1.0, 1.0), None, 1.0)
    records = [
        Record((i,), i, 1, f"{i}.png", (9, 9), "cat", (Answer((box,) * (i % 2 == 0), True, True),))
        for i in range(20)
    ]

    def chosen(count: int) -> list[int]:
        return [record.image_id for record in validation._samples(records, count)]

    assert chosen(4) == [0, 4, 10, 14]
    assert chosen(12) == [*range(0, 20, 2), 1, 11]
    assert len(chosen(99)) == 20
    assert chosen(0) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_of_a_mesh_come_together(monkeypatch, dtype):
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 1024)
    mesh, params = sharding.make_mesh(2, fsdp=4), tiny_predictor.params()
    block = params["vision"]["trunk"]["block_0"]
    params = {"vision": {"trunk": {"block_0": block}}, "scoring": params["scoring"]}
    spread = jax.device_put(params, sharding.param_shardings(params, mesh))
    assert not spread["scoring"]["prompt_mlp"]["fc1"]["kernel"].is_fully_replicated
    for given in (spread, jax.tree.map(jnp.asarray, params)):
        whole = flatten(gather_params(given, dtype))
        assert whole.keys() == flatten(params).keys()
        for path, leaf in flatten(params).items():
            assert whole[path].is_fully_addressable, path
            assert len(whole[path].devices()) == 1, path
            matrix = path.startswith("vision/") and path.endswith("/kernel")
            wanted = jnp.dtype(dtype if matrix else "float32")
            assert whole[path].dtype == wanted, path
            np.testing.assert_array_equal(whole[path], leaf.astype(wanted), err_msg=path)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


PROCESS = """
import json, sys
import conftest
import jax
port, number, annotations, output = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, int(number))
from pathlib import Path
import tiny_predictor
from sam3_jax import sharding
from sam3_jax.trainer.config import SplitConfig, ValidationConfig
from sam3_jax.trainer.validation import Validator
sharding.FSDP_MIN_SIZE = 1024
params = tiny_predictor.params()
mesh = sharding.make_mesh(1, fsdp=len(jax.devices()))
spread = jax.device_put(params, sharding.param_shardings(params, mesh))
model, config = tiny_predictor.config(), ValidationConfig(threshold=0.03, pictures=2)
# Each has a run's folder of its own: nothing is exchanged by files.
folder = Path(output) / number
split = SplitConfig(annotations, max_bad=0.5)
validator = Validator(split, config, model, dtype="float32", folder=folder)
with jax.set_mesh(mesh):
    found = validator.run(spread, 7)
print("RESULT", json.dumps([found.figures, found.failed, len(found.pictures)]))
"""


@pytest.mark.slow
def test_two_processes_share_the_work(split, tmp_path):
    (Path(split.annotations).parent / "cup.jpg").unlink()
    split.max_bad = 0.5
    expected = make(split, tmp_path / "one", pictures=2).run(tiny_predictor.params(), 7)
    port = str(free_port())
    command = [sys.executable, "-c", PROCESS, port]
    processes = [
        subprocess.Popen(
            [*command, str(number), split.annotations, str(tmp_path)],
            cwd=ROOT / "tests",
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    results = [json.loads(output.split("RESULT ")[1]) for output in outputs]
    for number, (figures, failed, pictures) in enumerate(results):
        assert flat(figures) == flat(expected.figures)
        assert failed == expected.failed != {}
        assert pictures == (len(expected.pictures) if number == 0 else 0)
    one, two = (tmp_path / f / "validation/step_00000007" for f in ("one", "0"))
    for name in ("metrics.json", "predictions.json"):
        assert json.loads((one / name).read_text()) == json.loads((two / name).read_text())
    assert not (tmp_path / "1").exists()

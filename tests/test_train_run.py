"""Whole runs of ``train.py`` in processes of their own, and what it says to mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import tiny_run
from sam3_jax import checkpoint
from sam3_jax.checkpoint.tree import flatten
from sam3_jax.config import rematerialized, sam3
from sam3_jax.trainer import resolve, start
from sam3_jax.trainer.config import TrainConfig, check_name
from sam3_jax.trainer.logs import read_log
from sam3_jax.trainer.start import RunError

ROOT = Path(__file__).resolve().parents[1]
CONFIG = Path(__file__).with_name("tiny_run.py")
TIMEOUT = 600  # seconds, for machines that do other things too


def environment(cache: Path | str = "off", devices: int = 1) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {
        **os.environ,
        "XLA_FLAGS": flags,
        "PYTHONPATH": paths,
        "SAM3_JAX_CACHE_DIR": str(cache),
    }


def command(data: Path, output: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "train.py"),
        f"--config={CONFIG}",
        f"--config.init.checkpoint={data.parents[1] / 'start'}",
        f"--config.train.annotations={data}",
        f"--config.output={output}",
        *more,
    ]


def train(data: Path, output: Path, cache: Path, *more: str, devices: int = 1) -> str:
    """Runs to the end; returns what it said."""
    done = subprocess.run(
        command(data, output, *more),
        env=environment(cache, devices),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def losses(output: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_log(output / "log.jsonl") if "loss" in line}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tiny_run.write_checkpoint(folder / "start")
    return tiny_run.write_data(folder / "pictures")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Programs that are compiled once for all runs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(data, cache, tmp_path_factory) -> Path:
    """Four steps without interruption, validated by the training pictures."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    said = train(data, output, cache, f"--config.valid.annotations={data}")
    assert "trained 4 steps" in said
    first, *others = [line for line in read_log(output / "log.jsonl") if line["kind"] == "train"]
    assert first["compile_s"] > 0
    assert not any(line.get("compile_s") for line in others)  # one program for all steps
    return output


@pytest.mark.slow
def test_a_run_writes_what_it_promises(whole):
    assert sorted(losses(whole)) == [1, 2, 3, 4]
    written = {path.name for path in whole.iterdir()}
    assert {"config.json", "log.jsonl", "states", "validation", "model"} <= written
    figures = [line for line in read_log(whole / "log.jsonl") if line["kind"] == "valid"]
    assert [line["step"] for line in figures] == [4]
    assert "segm/cgF1" in figures[0]
    loaded = checkpoint.load(whole / "model")
    assert loaded.metadata["step"] == 4
    assert loaded.config.image_size == 112
    settings = json.loads((whole / "config.json").read_text())
    assert settings["steps"] == 4


@pytest.mark.slow
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(data, cache, whole, tmp_path):
    """SIGTERM after the first step or two; then the same command: bit for bit the same."""
    output = tmp_path / "run"
    more = ("--config.checkpoint.every=1",)
    process = subprocess.Popen(
        command(data, output, *more),
        env=environment(cache),
        stderr=subprocess.PIPE,
        text=True,
    )
    log, deadline = output / "log.jsonl", time.monotonic() + TIMEOUT
    while not (log.exists() and '"train"' in log.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=TIMEOUT)[1]
    # On a quick machine all four steps may be over before the signal arrives.
    if process.returncode:
        assert process.returncode == 130, said[-3000:]
        assert "the same command goes on" in said
        assert not (output / "model").exists()
        assert "resuming after step" in train(data, output, cache, *more)
    assert losses(output) == losses(whole)
    ours, expected = (checkpoint.load(folder / "model").params for folder in (output, whole))
    for path, value in flatten(expected).items():
        np.testing.assert_array_equal(flatten(ours)[path], value, err_msg=path)


@pytest.mark.slow
def test_two_processes_give_one_process_losses(data, cache, tmp_path):
    """Two devices in one process, and one device in each of two, without dropout."""
    # Every device matches on its own host.
    more = ("--config.step.matcher=host", "--config.clicks.corrections=0")
    more += ("--config.data.example.sampling.phrases=1", "--config.data.example.augment.flip=0")
    train(data, tmp_path / "one", cache, *more, "--cpu_devices=2")
    assert read_log(tmp_path / "one" / "log.jsonl")[0]["devices"] == 2
    port = 20000 + os.getpid() % 20000
    join = ("--distributed", f"--coordinator=127.0.0.1:{port}", "--num_processes=2")
    processes = [
        subprocess.Popen(
            command(data, tmp_path / "two", *more, *join, f"--process_id={i}"),
            env={**environment(cache), "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], (
        said[0][-2000:] + said[1][-2000:]
    )
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys() == {1, 2, 3, 4}
    # Sums in another order; every further step magnifies the difference.
    np.testing.assert_allclose([two[i] for i in (1, 2)], [one[i] for i in (1, 2)], rtol=1e-4)


def test_mistakes_in_the_command(tmp_path):
    """Answers at once, without a trace."""
    for argument, said in (
        ("--config.optimzer.rate_scale=1", "did you mean 'optimizer'"),
        ("--config.optimizer.rate_scale.x=1", "with no field 'x'"),
        ("--config.batch_size=many", "batch_size=many"),
        ("--config.train.annotations=nowhere.json", "nowhere.json"),
    ):
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), f"--config={CONFIG}", argument],
            env=environment(),
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=TIMEOUT,
        )
        assert done.returncode != 0
        assert said in done.stderr + done.stdout, argument
        assert "Traceback" not in done.stderr, done.stderr[-2000:]


def test_names_of_settings():
    assert check_name("optimizer.vision.rate") is None
    assert check_name("data.example.augment.flip") is None
    assert "did you mean 'rate'" in check_name("optimizer.vision.rates")


def test_configurations_that_cannot_run(data, tmp_path):
    config = tiny_run.get_config()
    config.output = str(tmp_path / "run")
    with pytest.raises(RunError, match="no training data"):
        start.prepare_data(config)
    config.data.example.mask_size = 0
    with pytest.raises(RunError, match="mask_size"):
        resolve.data_config(config, tmp_path)
    config = tiny_run.get_config()
    config.data.example.clicks = 0
    with pytest.raises(RunError, match=r"data\.example\.clicks"):
        resolve.data_config(config, tmp_path)
    with pytest.raises(RunError, match="resolution=100 must be a multiple of 14"):
        start.training_model(config.model, config.model, 100)
    with pytest.raises(RunError, match="batch_size=2 in 1 micro-batches cannot be split over 8"):
        resolve.make_run_mesh(tiny_run.get_config())


def test_a_checkpoint_brings_its_sizes_and_the_configuration_its_training():
    wanted, released = rematerialized(sam3()), sam3()
    released.vision.depth, wanted.fusion.dropout = 3, 0.25
    model = start.training_model(wanted, released, 560)
    assert (model.vision.depth, model.image_size) == (3, 560)
    assert model.fusion.dropout == 0.25
    assert model.vision.remat
    assert released.image_size == 1008  # as it was


def test_the_configurations_in_the_repository():
    """Every variant says things that the loop can do."""
    import runpy

    files = sorted((ROOT / "configs").glob("*.py"))
    assert len(files) >= 7
    for file in files:
        names = runpy.run_path(str(file))
        get_config = names["get_config"]
        variants = tuple(names.get("STAGES") or names.get("VARIANTS") or (None,))
        for variant in variants:
            config = get_config(variant) if variant else get_config()
            assert isinstance(config, TrainConfig)
            assert config.batch_size % config.step.accumulate == 0
            if config.task == "tracker":
                resolve.clip_data_config(config, Path("unused"))
                # Compared at no less than the size that the model gives.
                cells = config.clips.resolution // config.model.vision.patch_size
                assert config.clips.mask_size >= 4 * cells
                continue
            data = resolve.data_config(config, Path("unused"))
            assert data.example.mask_size or not config.loss.masks
        if variants[0]:
            with pytest.raises(ValueError, match="no .* 'x'"):
                get_config("x")


def test_configurations_are_found_where_the_package_is_installed(tmp_path, monkeypatch):
    from sam3_jax.trainer import cli

    package = tmp_path / "sam3_jax"
    (package / "configs").mkdir(parents=True)
    (package / "configs" / "sam3_gpu.py").touch()
    monkeypatch.setattr(cli, "__file__", str(package / "trainer" / "cli.py"))
    monkeypatch.chdir(tmp_path)
    found = cli.find_config("--config=configs/sam3_gpu.py:big")
    assert found == f"--config={package / 'configs' / 'sam3_gpu.py'}:big"
    for same in ("--config=configs/other.py", "--config.output=configs/sam3_gpu.py", "--verbose"):
        assert cli.find_config(same) == same
    (tmp_path / "mine.py").touch()
    assert cli.find_config("--config=mine.py:x") == "--config=mine.py:x"

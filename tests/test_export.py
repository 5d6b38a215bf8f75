"""Checkpoints back to PyTorch: exact to the bit, and read by torch and transformers."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import oracle
from sam3_jax import checkpoint, config
from sam3_jax.checkpoint import CheckpointError, load, load_unused
from sam3_jax.checkpoint.tree import flatten, unflatten
from sam3_jax.convert import cli
from sam3_jax.convert.convert import convert
from sam3_jax.convert.errors import ConversionError
from sam3_jax.convert.export import (
    HF_LAYOUTS,
    to_hf_tensors,
    to_torch_names,
    total_bytes,
    write_hf,
    write_sam3_pt,
)
from sam3_jax.convert.source import open_source
from sam3_jax.convert.table import CLASS_ROW, POS_EMBED, unused_names
from sam3_jax.models.detector import init_shapes

# transformers fixes 64 channels of memory, and our encoder projects to them only from more.
SMALL = dataclasses.replace(config.tiny(), dim=128)
SMALL.memory.dim = 64
BUILD = {
    "Sam3Model": oracle.detector,
    "Sam3TrackerModel": oracle.tracker,
    "Sam3TrackerVideoModel": oracle.tracker_video,
    "Sam3VideoModel": oracle.video,
}


@pytest.fixture(scope="module")
def weights() -> tuple[dict, dict[str, np.ndarray]]:
    """Random parameters and unused tensors of the small model."""
    rng = np.random.default_rng(0)
    shapes = flatten(init_shapes(SMALL))
    params = {path: rng.standard_normal(leaf.shape, np.float32) for path, leaf in shapes.items()}
    unused = {name: rng.standard_normal((3, 2), np.float32) for name in unused_names(SMALL)}
    for name in unused:
        if name.endswith("freqs_cis"):
            unused[name] = np.exp(1j * rng.standard_normal((16, 8))).astype(np.complex64)
    unused[CLASS_ROW] = rng.standard_normal((1, 1, 48), np.float32)
    return unflatten(params), unused


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(actual) == sorted(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert torch.equal(actual[name], tensor), name


def test_sam3_pt_there_and_back(weights: tuple, tmp_path: Path):
    """torch's own file -> checkpoint -> our file, read by torch, also mapped."""
    original = {
        name: torch.from_numpy(np.array(array))
        for name, array in to_torch_names(*weights, SMALL).items()
    }
    assert original[POS_EMBED].shape == (1, 17, 48)
    torch.save(original, tmp_path / "sam3.pt")
    convert(open_source(str(tmp_path / "sam3.pt")), tmp_path / "ckpt", config=SMALL)
    checkpoint_arguments = ["--input", str(tmp_path / "ckpt"), "--to-torch"]
    back = tmp_path / "back.pt"
    assert cli.main([*checkpoint_arguments, "--output", str(back)]) == 0
    assert_same(torch.load(back, weights_only=True), original)
    assert_same(torch.load(back, weights_only=True, mmap=True), original)
    assert_same(
        {name: torch.from_numpy(np.array(a)) for name, a in open_source(str(back)).tensors.items()},
        original,
    )


def test_the_archive_is_as_torch_writes_it(tmp_path: Path):
    """Stored, and every entry at a multiple of 64 bytes, so that tensors can be mapped."""
    params = {"tracker": {"no_memory_embed": {"embedding": np.ones((1, 32), np.float32)}}}
    unused = {"tracker.no_mem_pos_enc": np.ones((1, 1, 3)), "tracker.x": np.ones(5, np.float16)}
    write_sam3_pt(tmp_path / "sam3.pt", params, unused, config.tiny())
    data = (tmp_path / "sam3.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "sam3.pt") as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            header = data[info.header_offset + 26 : info.header_offset + 30]
            start = info.header_offset + 30 + sum(np.frombuffer(header, "<u2").tolist())
            assert start % 64 == 0, info.filename
    tensors = torch.load(tmp_path / "sam3.pt", weights_only=True)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "tracker.no_mem_embed": ((1, 1, 32), torch.float32),
        "tracker.no_mem_pos_enc": ((1, 1, 3), torch.float64),
        "tracker.x": ((5,), torch.float16),
    }


@pytest.mark.parametrize("name", HF_LAYOUTS)
def test_transformers_there_and_back(name: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    """A class's folder -> checkpoint -> a folder from which the class loads the same weights."""
    model = oracle.randomize(BUILD[name](SMALL), seed=1)
    model.save_pretrained(tmp_path / "hf")
    assert cli.main(["--input", str(tmp_path / "hf"), "--output", str(tmp_path / "ckpt")]) == 0
    arguments = ["--input", str(tmp_path / "ckpt"), "--output", str(tmp_path / "back")]
    assert cli.main([*arguments, "--to-hf", name]) == 0

    loader = getattr(transformers, name).from_pretrained
    back, report = loader(tmp_path / "back", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(back.state_dict(), model.state_dict())
    sizes = [m.config for m in back.modules() if hasattr(m, "config")]
    vits = [size for size in sizes if size.model_type == "sam3_vit_model"]
    assert {vit.layer_norm_eps for vit in vits} == {SMALL.vision.layer_norm_eps}
    assert {tuple(vit.global_attn_indexes) for vit in vits} == {SMALL.vision.global_blocks}

    assert cli.main([*arguments, "--to-hf", name]) == 1
    assert "exists already" in capsys.readouterr().err
    assert cli.main([*arguments, "--to-hf", name, "--overwrite"]) == 0


def test_from_transformers_to_sam3_pt(weights: tuple, tmp_path: Path, capsys):
    """What transformers lacks is zero or absent, the rest is there; and the user hears of it."""
    params, unused = weights
    write_hf(tmp_path / "hf", params, unused, SMALL, "Sam3VideoModel")
    assert cli.main(["--input", str(tmp_path / "hf"), "--output", str(tmp_path / "ckpt")]) == 0
    arguments = ["--input", str(tmp_path / "ckpt"), "--output", str(tmp_path / "sam3.pt")]
    assert cli.main([*arguments, "--to-torch"]) == 0
    assert "lacks RoPE tables" in capsys.readouterr().out
    expected = to_torch_names(params, unused, SMALL)
    actual = torch.load(tmp_path / "sam3.pt", weights_only=True)
    absent = set(expected) - set(actual)
    assert absent == {name for name in expected if name.endswith("freqs_cis")}
    for name, tensor in actual.items():
        if "geometry_encoder.points_" in name:
            assert not tensor.any()
        elif name == POS_EMBED:
            np.testing.assert_array_equal(tensor[:, 1:], expected[name][:, 1:])
            assert not tensor[:, 0].any()
        else:
            np.testing.assert_array_equal(tensor, expected[name], err_msg=name)


def test_both_copies_of_a_matrix_are_written(weights: tuple):
    tensors = to_hf_tensors(*weights, SMALL, "Sam3TrackerModel")
    a = tensors["shared_image_embedding.positional_embedding"]
    b = tensors["prompt_encoder.shared_embedding.positional_embedding"]
    np.testing.assert_array_equal(a, b)


def test_a_class_that_needs_more_than_there_is(weights: tuple, tmp_path: Path):
    params = {"tracker": weights[0]["tracker"], "vision": weights[0]["vision"]}
    with pytest.raises(
        ConversionError, match=r"Sam3Model needs \d+ parameters .*lacks, such as text/"
    ):
        write_hf(tmp_path / "hf", params, {}, SMALL, "Sam3Model")
    assert list(tmp_path.iterdir()) == []


def _to_torch(path: Path, weights: tuple, **options) -> None:
    write_sam3_pt(path, *weights, SMALL, **options)


def _to_hf(path: Path, weights: tuple, **options) -> None:
    write_hf(path, *weights, SMALL, "Sam3Model", **options)


@pytest.mark.parametrize("write", [_to_torch, _to_hf])
def test_nothing_is_lost_and_nothing_half_written_stays(
    write: Callable, weights: tuple, tmp_path: Path
):
    def full(count: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="new: writing failed, nothing was kept.*No space"):
        write(tmp_path / "new", weights, progress=full)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("a")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="mine: exists already"):
            write(tmp_path / "mine", weights, overwrite=overwrite)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "a"


def test_progress_covers_all_bytes(weights: tuple, tmp_path: Path):
    heard: list[int] = []
    write_sam3_pt(tmp_path / "sam3.pt", *weights, SMALL, progress=heard.append)
    assert sum(heard) == total_bytes(*weights)


def test_a_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture):
    arguments = ["--input", str(tmp_path), "--output", str(tmp_path / "x.pt"), "--to-torch"]
    assert cli.main(arguments) == 1
    assert "no checkpoint, it has no config.json" in capsys.readouterr().err
    assert checkpoint.is_checkpoint(tmp_path) is False
    assert list(tmp_path.iterdir()) == []


def test_unused_tensors_travel(weights: tuple, tmp_path: Path):
    params, unused = weights
    write_sam3_pt(tmp_path / "sam3.pt", params, unused, SMALL)
    convert(open_source(str(tmp_path / "sam3.pt")), tmp_path / "ckpt", config=SMALL)
    kept = load_unused(tmp_path / "ckpt")
    assert kept.keys() == unused.keys()
    for name, array in unused.items():
        assert (kept[name].dtype, kept[name].tobytes()) == (array.dtype, array.tobytes()), name
    actual, expected = flatten(load(tmp_path / "ckpt").params), flatten(params)
    for path, array in expected.items():
        np.testing.assert_array_equal(actual[path], array, err_msg=path)

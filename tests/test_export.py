"""Checkpoints back to PyTorch: exact to the bit, readable by torch and transformers."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
import transformers
from oracle.params import params_from_hf

from sam3_jax import checkpoint
from sam3_jax import config as config_lib
from sam3_jax.checkpoint import CheckpointError, flatten, unflatten
from sam3_jax.convert.convert import convert
from sam3_jax.convert.errors import ConversionError
from sam3_jax.convert.export import HF_LAYOUTS, to_torch_names, write_hf, write_sam3_pt
from sam3_jax.convert.source import open_source
from sam3_jax.convert.table import CLASS_ROW, POS_EMBED, unused_names
from sam3_jax.models.detector import init_shapes

# transformers fixes 64 channels of memory; the tracker has no projection to them from 64.
SMALL = dataclasses.replace(config_lib.tiny(), dim=128)
SMALL.memory.dim = 64
BUILD = {
    "Sam3Model": oracle.detector,
    "Sam3TrackerModel": oracle.tracker,
    "Sam3TrackerVideoModel": oracle.tracker_video,
    "Sam3VideoModel": oracle.video,
}


def _release(rng: np.random.Generator, config: config_lib.ModelConfig) -> dict[str, np.ndarray]:
    """Random tensors with the names of sam3.pt, unused ones included."""
    params = {
        path: rng.standard_normal(leaf.shape, np.float32)
        for path, leaf in flatten(init_shapes(config)).items()
    }
    unused = {name: rng.standard_normal((3, 2), np.float32) for name in unused_names(config)}
    for name in unused:
        if name.endswith("freqs_cis"):
            unused[name] = np.exp(1j * rng.standard_normal((16, 8))).astype(np.complex64)
    unused[CLASS_ROW] = rng.standard_normal((1, 1, config.vision.dim), np.float32)
    return to_torch_names(unflatten(params), unused, config)


def _assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(actual) == sorted(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert actual[name].numpy().tobytes() == tensor.numpy().tobytes(), name


@pytest.mark.parametrize("config", [config_lib.tiny(), SMALL], ids=["tiny", "small"])
def test_sam3_pt_there_and_back(
    config: config_lib.ModelConfig, rng: np.random.Generator, tmp_path: Path
) -> None:
    original = {name: torch.from_numpy(np.array(a)) for name, a in _release(rng, config).items()}
    assert original[POS_EMBED].shape[1] == config.vision.pos_grid**2 + 1
    torch.save(original, tmp_path / "sam3.pt")
    convert(open_source(str(tmp_path / "sam3.pt")), tmp_path / "jax", config=config)
    loaded = checkpoint.load(tmp_path / "jax")
    unused = checkpoint.load_unused(tmp_path / "jax")
    back = tmp_path / "back.pt"
    write_sam3_pt(back, loaded.params, unused, loaded.config)
    _assert_same(torch.load(back, weights_only=True), original)
    _assert_same(torch.load(back, weights_only=True, mmap=True), original)


def test_the_written_archive_is_as_torch_writes_it(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    """Stored, and every storage at a multiple of 64 bytes, so that it can be mapped."""
    params = {"tracker": {"no_memory_embed": rng.standard_normal(32, np.float32)}}
    path = tmp_path / "sam3.pt"
    write_sam3_pt(path, params, {"tracker.no_mem_pos_enc": np.ones((1, 1, 3))}, config_lib.tiny())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            header = path.read_bytes()[info.header_offset + 26 : info.header_offset + 30]
            names, extra = np.frombuffer(header, "<u2").tolist()
            assert (info.header_offset + 30 + names + extra) % 64 == 0, info.filename
    tensors = torch.load(path, weights_only=True)
    assert list(tensors) == ["tracker.no_mem_embed", "tracker.no_mem_pos_enc"]
    assert tensors["tracker.no_mem_embed"].shape == (1, 1, 32)
    assert tensors["tracker.no_mem_pos_enc"].dtype == torch.float64


@pytest.mark.parametrize("name", HF_LAYOUTS)
def test_hf_there_and_back(name: str, tmp_path: Path) -> None:
    model = oracle.randomize(BUILD[name](SMALL), seed=1)
    model.save_pretrained(tmp_path / "hf")
    convert(open_source(str(tmp_path / "hf")), tmp_path / "jax")
    loaded = checkpoint.load(tmp_path / "jax")
    assert loaded.config.vision.layer_norm_eps == SMALL.vision.layer_norm_eps
    unused = checkpoint.load_unused(tmp_path / "jax")
    write_hf(tmp_path / "back", loaded.params, unused, loaded.config, name)

    back, report = getattr(transformers, name).from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    _assert_same(back.state_dict(), model.state_dict())
    sizes = [m.layer_norm_eps for m in _vit_configs(back)]
    assert sizes and set(sizes) == {SMALL.vision.layer_norm_eps}


def _vit_configs(model: torch.nn.Module) -> list:
    found = [module.config for module in model.modules() if hasattr(module, "config")]
    return [config for config in found if config.model_type == "sam3_vit_model"]


def test_a_class_that_needs_more_than_the_checkpoint_has(tmp_path: Path) -> None:
    params = params_from_hf(oracle.randomize(oracle.tiny_tracker(), seed=0), config_lib.tiny())
    with pytest.raises(ConversionError, match="Sam3Model needs .* parameters .* lacks"):
        write_hf(tmp_path / "hf", params, {}, config_lib.tiny(), "Sam3Model")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path: Path) -> None:
    params = {"tracker": {"no_memory_embed": np.ones(32, np.float32)}}
    taken = tmp_path / "sam3.pt"
    taken.write_bytes(b"mine")
    with pytest.raises(CheckpointError, match=r"sam3\.pt: exists already"):
        write_sam3_pt(taken, params, {}, config_lib.tiny())
    assert taken.read_bytes() == b"mine"

    def full(count: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        write_sam3_pt(tmp_path / "new.pt", params, {}, config_lib.tiny(), progress=full)
    assert [path.name for path in tmp_path.iterdir()] == ["sam3.pt"]

"""Convolutions before the patches, which the demo's model has and the released one has not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sam3_jax import config
from sam3_jax.checkpoint import CheckpointError, sizes
from sam3_jax.checkpoint.tree import flatten
from sam3_jax.convert.errors import ConversionError
from sam3_jax.convert.export import HF_LAYOUTS, to_hf_tensors, to_torch_names
from sam3_jax.models.convolutions import HalvingBlock
from sam3_jax.models.vit import VisionTransformer

STEM = (6, 10)


def with_stem() -> config.ModelConfig:
    model = config.tiny()
    model.vision = dataclasses.replace(model.vision, stem=STEM, patch_size=8)
    return model


def test_a_block_is_torchs_convolutions_and_norms():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 8, 12, 3)).astype(np.float32)
    block = HalvingBlock(10)
    params = block.init(jax.random.key(0), jnp.asarray(x))["params"]
    params = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(np.float32), params)
    actual = block.apply({"params": jax.tree.map(jnp.asarray, params)}, jnp.asarray(x))

    def step(x: torch.Tensor, name: str, norm: str, stride: int) -> torch.Tensor:
        kernel = torch.from_numpy(params[name]["kernel"].transpose(3, 2, 0, 1))
        bias = torch.from_numpy(params[name]["bias"])
        y = torch.nn.functional.conv2d(x, kernel, bias, stride=stride, padding=1)
        scale, shift = (torch.from_numpy(params[norm][key]) for key in ("scale", "bias"))
        y = torch.nn.functional.layer_norm(y.movedim(1, -1), (10,), scale, shift)
        return torch.relu(y).movedim(-1, 1)

    y = step(torch.from_numpy(x.transpose(0, 3, 1, 2)), "down", "down_norm", 2)
    y = y + step(y, "conv", "conv_norm", 1)
    # Normalised values of order 1, after float32 sums of at most 90 products.
    chex.assert_trees_all_close(actual, y.numpy().transpose(0, 2, 3, 1), atol=2e-5)


def test_the_patches_are_those_of_the_stems_map():
    """A trunk with a stem is the stem's blocks and then patches, of the side that is left."""
    vision = with_stem().vision
    pixels = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (1, 32, 64, 3)), jnp.float32)
    trunk = VisionTransformer(vision)
    params = trunk.init(jax.random.key(0), pixels)["params"]
    assert params["patch_embed"]["kernel"].shape == (2, 2, STEM[-1], vision.dim)
    actual, inner = trunk.apply({"params": params}, pixels, capture_intermediates=True)
    assert actual.shape == (1, 4, 8, vision.dim)
    x = pixels
    for i, width in enumerate(STEM):
        x = HalvingBlock(width).apply({"params": params[f"stem_{i}"]}, x)
    patches = x.reshape(1, 4, 2, 8, 2, STEM[-1]).swapaxes(2, 3)
    expected = jnp.einsum("bhwijc,ijcd->bhwd", patches, params["patch_embed"]["kernel"])
    (embedded,) = inner["intermediates"]["patch_embed"]["__call__"]
    # float32 sums of 40 products of order .1.
    chex.assert_trees_all_close(embedded, expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"\(36, 64\) must be multiples of 8 pixels"):
        trunk.apply({"params": params}, jnp.zeros((1, 36, 64, 3)))
    odd = VisionTransformer(dataclasses.replace(vision, patch_size=14))
    with pytest.raises(ValueError, match="patch_size 14 cannot be halved 2 times"):
        jax.eval_shape(odd.init, jax.random.key(0), jnp.zeros((1, 28, 28, 3)))


@pytest.mark.parametrize(("stem", "patch"), [((6,), 4), ((6, 10, 12), 16), ((6, 12), 8)])
def test_the_configuration_must_have_the_parameters_stem(stem: tuple[int, ...], patch: int):
    model = with_stem()
    trunk = VisionTransformer(model.vision)
    shapes = jax.eval_shape(trunk.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    paths = {f"vision/trunk/{path}": leaf.shape for path, leaf in flatten(shapes).items()}
    sizes.check_sizes(Path("here"), model, paths)
    model.vision = dataclasses.replace(model.vision, stem=stem, patch_size=patch)
    with pytest.raises(CheckpointError, match=r"vision\.stem is .* parameters have \(6, 10\)"):
        sizes.check_sizes(Path("here"), model, paths)
    model.vision = dataclasses.replace(model.vision, stem=STEM, patch_size=4)
    with pytest.raises(CheckpointError, match=r"vision\.patch_size is 4, the parameters have 8"):
        sizes.check_sizes(Path("here"), model, paths)


def test_pytorch_has_no_such_model():
    with pytest.raises(ConversionError, match=r"vision\.stem = \(6, 10\)"):
        to_torch_names({}, {}, with_stem())
    for layout in HF_LAYOUTS:
        with pytest.raises(ConversionError, match="convolutions before its patches"):
            to_hf_tensors({}, {}, with_stem(), layout)

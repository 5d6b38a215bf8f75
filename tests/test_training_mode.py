"""What training needs of the model: initial values, dropout, drop path, remat; and the parts of the
configuration that no released weights use (more fusion levels, mask prompts)."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parity import Model, assert_close, geometry, random_params
from sam3_jax import config
from sam3_jax.models.decoder import BoxBias, look_inside
from sam3_jax.models.detector import Sam3, empty_geometry, init_shapes
from sam3_jax.models.layers import DropPath

CONFIG = config.tiny()
ZERO = jnp.zeros(1, jnp.int32)


class FreshValues:
    """Initial value of a parameter by its path, without making the others."""

    def __init__(self, model: config.ModelConfig = CONFIG) -> None:
        self._makers = {}
        param = nn.Module.param

        def spy(module: nn.Module, name: str, init: Callable, *shape: tuple[int, ...]):
            self._makers["/".join((*module.path, name))] = init, shape
            return param(module, name, init, *shape)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.Module, "param", spy)
            init_shapes(model)

    def __getitem__(self, path: str) -> np.ndarray:
        init, shape = self._makers[path]
        return np.asarray(init(jax.random.key(zlib.crc32(path.encode())), *shape))


@pytest.fixture(scope="module")
def fresh() -> FreshValues:
    return FreshValues()


def uniform(values: np.ndarray, bound: float) -> bool:
    """Inside the bound, near it, and with a uniform distribution's deviation (small: about)."""
    slack = 0.05 if values.size > 500 else 0.3
    return (
        np.abs(values).max() <= bound
        and np.abs(values).max() > (1 - slack) * bound
        and abs(values.std() / (bound / 3**0.5) - 1) < slack
    )


def test_initial_values(fresh):
    """Upstream: ``_reset_parameters``, ``ViT._init_weights``, PyTorch's defaults."""
    dim = CONFIG.dim
    for name in ("vision/trunk/block_0/mlp/fc1/kernel", "vision/trunk/pos_embed"):
        assert abs(fresh[name].std() - 0.02) < 0.002, name
    assert not fresh["vision/trunk/block_0/attn/q/bias"].any()
    # q, k and v are drawn as one (3 dim, dim) matrix, here and wherever nn.MultiheadAttention is.
    for name in ("fusion/layer_0/self_attn/q/kernel", "geometry/layer_0/cross_attn/k/kernel"):
        assert uniform(fresh[name], (6 / (4 * dim)) ** 0.5), name
    assert uniform(fresh["fusion/layer_0/self_attn/out/kernel"], (6 / (2 * dim)) ** 0.5)
    assert uniform(fresh["geometry/layer_0/self_attn/out/kernel"], dim**-0.5)
    hidden = CONFIG.fusion.mlp_dim
    assert uniform(fresh["fusion/layer_0/ffn/fc1/kernel"], (6 / (dim + hidden)) ** 0.5)
    assert uniform(fresh["fusion/layer_0/ffn/fc1/bias"], dim**-0.5)
    assert uniform(fresh["geometry/layer_0/ffn/fc2/kernel"], hidden**-0.5)
    assert uniform(fresh["decoder/presence_token/embedding"], (6 / (1 + dim)) ** 0.5)
    assert not fresh["decoder/box_head/layer_2/kernel"].any()
    assert not fresh["decoder/box_head/layer_2/bias"].any()
    assert uniform(fresh["decoder/box_head/layer_0/kernel"], dim**-0.5)
    for name in ("query_embed", "reference_points"):
        assert abs(fresh[f"decoder/{name}/embedding"].std() - 1) < 0.2, name
    assert abs(fresh["text/token_embed/embedding"].std() - 1) < 0.01
    np.testing.assert_array_equal(fresh["tracker/memory_encoder/block_0/gamma"], np.float32(1e-6))
    assert uniform(fresh["segmentation/conv_0/kernel"], (9 * dim) ** -0.5)
    # PyTorch takes a transposed convolution's fan from its output channels.
    assert uniform(
        fresh["vision/detector_neck/level_0_up_0/kernel"], (4 * CONFIG.vision.dim // 2) ** -0.5
    )
    assert abs(fresh["tracker/memory_time_embed/embedding"].std() - 0.02) < 0.006


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(CONFIG, random_params(CONFIG))


@pytest.fixture(scope="module")
def scene(model):
    rng = np.random.default_rng(1)
    pixels = rng.uniform(-1, 1, (1, 112, 112, 3)).astype(np.float32)
    ids = rng.integers(300, 40000, (1, 32)).astype(np.int32)
    levels = model("encode_image", pixels, tracker=False).detector
    return jnp.asarray(pixels), levels, model("encode_text", ids)


def test_queries_spread_over_the_picture():
    """Every place has a query's box near it, where boxes by chance crowd in the middle."""
    demo = config.demo()
    assert demo.decoder.spread_queries
    logits = FreshValues(demo)["decoder/reference_points/embedding"]
    boxes = 1 / (1 + np.exp(-logits))
    n = demo.decoder.num_queries
    assert boxes.shape == (n, 4)
    np.testing.assert_allclose(boxes[:, 2:], n**-0.5, rtol=1e-5)
    places = (np.stack(np.meshgrid(*[np.arange(16)] * 2), -1).reshape(-1, 1, 2) + 0.5) / 16
    farthest = np.abs(places - boxes[:, :2]).max(-1).min(-1).max()
    assert farthest < 1.1 * n**-0.5  # of a perfect grid: half of that
    by_chance = 1 / (1 + np.exp(-FreshValues()["decoder/reference_points/embedding"]))
    assert np.abs(by_chance[:, 2:] - 0.5).max() > 0.2


def test_queries_look_into_their_boxes():
    """Fresh ones: most of the attention that the bias asks for lies on or beside the box."""
    demo = config.demo()
    values, params = FreshValues(demo), {}
    for axis in ("x", "y"):
        for layer in ("layer_0", "layer_1"):
            for name in ("kernel", "bias"):
                found = jnp.asarray(values[f"decoder/box_bias/{axis}/{layer}/{name}"])
                params.setdefault(axis, {}).setdefault(layer, {})[name] = found
    boxes = np.array([[0.5, 0.5, 0.25, 0.25], [0.2, 0.7, 0.1, 0.3], [0.9, 0.1, 0.2, 0.2]])
    module = BoxBias(demo.dim, demo.decoder.num_heads)
    params = look_inside({"box_bias": params})["box_bias"]
    bias = module.apply({"params": params}, jnp.asarray(boxes[None], jnp.float32), ((16, 16),))
    weight = np.asarray(jax.nn.softmax(bias[0], axis=-1)).reshape(-1, 3, 16, 16)
    cells = (np.arange(16) + 0.5) / 16
    for number, (x, y, w, h) in enumerate(boxes):
        near = (abs(cells - y) < h / 2 + 1 / 16)[:, None] & (abs(cells - x) < w / 2 + 1 / 16)
        assert (weight[:, number][:, near].sum(-1) > 0.75).all()  # evenly: at most .15


def test_dropout_follows_its_key(model, scene):
    _, levels, text = scene

    @jax.jit
    def run(key):
        return model.module.apply(
            {"params": model.params},
            *(levels, text, geometry(1), ZERO, ZERO),
            deterministic=False,
            rngs={"dropout": key},
            method="ground",
        ).pred_logits

    first, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert np.isfinite(first).all()


def test_drop_path_drops_whole_samples():
    """Windows of one image share their fate; what is kept is scaled up to keep the mean."""
    x = jnp.ones((400 * 4, 2, 3))
    layer = DropPath(0.25, rows=4)
    out = layer.apply({}, x, deterministic=False, rngs={"dropout": jax.random.key(0)})
    out = np.asarray(out).reshape(400, -1)
    assert (out == out[:, :1]).all()
    assert set(np.unique(out[:, 0]).round(5)) == {0.0, np.float32(4 / 3).round(5)}
    assert abs((out[:, 0] == 0).mean() - 0.25) < 0.06
    np.testing.assert_array_equal(layer.apply({}, x), x)


def test_drop_path_rises_with_depth(model, scene):
    pixels = scene[0]

    def run(rate: float, seed: int):
        vision = dataclasses.replace(CONFIG.vision, drop_path=rate)
        module = Sam3(dataclasses.replace(CONFIG, vision=vision))
        return module.apply(
            {"params": model.params},
            pixels,
            deterministic=False,
            rngs={"dropout": jax.random.key(seed)},
            method="encode_trunk",
        )

    still = model("encode_image", pixels, tracker=False).trunk
    assert_close(run(0.0, 0), still, 1e-5, "no drop path")
    assert any(np.abs(run(0.9, seed) - still).max() > 1e-2 for seed in range(3))


@pytest.mark.slow
def test_remat_changes_nothing(model, scene):
    """Forward and gradient with every ``remat`` on."""
    pixels, _, text = scene
    other = config.tiny()
    for part in (other.vision, other.text, other.fusion, other.decoder):
        part.remat = True

    def loss(module: Sam3):
        def run(params: dict):
            features = module.apply(
                {"params": params}, pixels, tracker=False, method="encode_image"
            )
            args = (features.detector, text, empty_geometry(1), ZERO, ZERO)
            out = module.apply({"params": params}, *args, method="ground")
            return (out.pred_masks**2).mean() + (out.layer_boxes**2).sum()

        return jax.jit(jax.value_and_grad(run))

    value, grads = loss(model.module)(model.params)
    value2, grads2 = loss(Sam3(other))(model.params)
    np.testing.assert_allclose(value2, value, rtol=1e-5)
    for group in ("vision", "decoder"):
        a, b = (
            jnp.concatenate([g.ravel() for g in jax.tree.leaves(t[group])]) for t in (grads, grads2)
        )
        assert_close(b, a, 1e-5, group)


def test_more_fusion_levels(scene):
    """Two levels fused: positions and bias for each, masks from the stride-14 slice."""
    cfg = dataclasses.replace(CONFIG, fusion=dataclasses.replace(CONFIG.fusion, num_levels=2))
    model = Model(cfg, random_params(cfg))
    assert model.params["fusion"]["level_embed"].shape == (2, CONFIG.dim)
    _, levels, text = scene
    out = model("ground", levels, text, geometry(1), ZERO, ZERO)
    assert out.memory.shape == (1, 16 * 16 + 8 * 8, CONFIG.dim)
    assert out.pred_masks.shape == (1, CONFIG.decoder.num_queries, 32, 32)

    # The finer level must reach the boxes.
    changed = (levels[0], levels[1] + 1.0, levels[2])
    moved = model("ground", changed, text, geometry(1), ZERO, ZERO)
    assert np.abs(moved.pred_boxes - out.pred_boxes).max() > 1e-4


def test_mask_prompts(scene):
    """Untrained by the released weights: parameters appear with the switch, and masks matter."""
    _, levels, text = scene
    rng = np.random.default_rng(0)
    masks = rng.uniform(0, 1, (1, 1, 40, 60)).astype(np.float32)
    given = empty_geometry(1, masks=1)._replace(masks=masks, mask_mask=np.ones((1, 1), bool))
    with pytest.raises(ValueError, match=r"geometry\.mask_prompts=True"):
        Model(CONFIG, random_params(CONFIG))("ground", levels, text, given, ZERO, ZERO)

    part = dataclasses.replace(CONFIG.geometry, mask_prompts=True)
    cfg = dataclasses.replace(CONFIG, geometry=part)
    model = Model(cfg, random_params(cfg))

    def logits(geo):
        return model("ground", levels, text, geo, ZERO, ZERO).pred_logits

    nothing = logits(empty_geometry(1, masks=1))
    with_mask = logits(given)
    negative = logits(given._replace(mask_labels=np.zeros((1, 1), np.int32)))
    positive = logits(given._replace(mask_labels=np.ones((1, 1), np.int32)))
    assert np.abs(with_mask - nothing).max() > 1e-4
    np.testing.assert_array_equal(with_mask, negative)  # label 0 is negative
    assert np.abs(positive - negative).max() > 1e-5

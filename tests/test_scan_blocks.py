"""Blocks as a loop (``scan``) give what blocks one by one give: values, gradients, names."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parity import assert_close, random_params
from sam3_jax import config
from sam3_jax.models.fusion import FusionEncoder
from sam3_jax.models.layers import DropPath
from sam3_jax.models.text import TextEncoder
from sam3_jax.models.vit import VisionTransformer

CONFIG = config.tiny()


@pytest.fixture(scope="module")
def params() -> dict:
    return random_params(CONFIG)


def scanned(part, *, remat: bool = True):
    return dataclasses.replace(part, scan=True, remat=remat)


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, shape), jnp.float32)


def run_and_grad(module: nn.Module, params: dict, *args):
    """Output of a module, and the gradient of a sum over it, by parameters."""

    def loss(params: dict):
        out = jax.tree.leaves(module.apply({"params": params}, *args))[0]
        return (out * draw(9, *out.shape)).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return out, grads


def assert_same(plain: nn.Module, loop: nn.Module, params: dict, *args) -> None:
    """The same parameters, values and gradients. The two programs round in other places."""
    fresh = jax.eval_shape(loop.init, jax.random.key(0), *args)["params"]
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)
    out, grads = run_and_grad(plain, params, *args)
    out2, grads2 = run_and_grad(loop, params, *args)
    assert_close(out2, out, 1e-5, "values")
    assert jax.tree.structure(grads) == jax.tree.structure(grads2)
    most = max(float(jnp.abs(grad).max()) for grad in jax.tree.leaves(grads))
    for (path, grad), other in zip(
        jax.tree_util.tree_flatten_with_path(grads)[0], jax.tree.leaves(grads2), strict=True
    ):
        # Key biases cancel in the softmax: their gradients are the others' rounding.
        scale = max(float(jnp.abs(grad).max()), 0.01 * most)
        np.testing.assert_allclose(other, grad, rtol=0, atol=2e-5 * scale, err_msg=str(path))


# 8 x 8 cells: windows of 4 divide them, of 3 do not. Global: every other block, or in no order.
@pytest.mark.parametrize(
    ("window", "blocks", "remat"),
    [(4, (1, 3), True), (3, (0, 3), False)],
    ids=["groups", "padded"],
)
def test_vision(params, window, blocks, remat):
    cfg = dataclasses.replace(CONFIG.vision, window_size=window, global_blocks=blocks)
    plain, loop = VisionTransformer(cfg), VisionTransformer(scanned(cfg, remat=remat))
    assert_same(plain, loop, params["vision"]["trunk"], draw(0, 2, 112, 112, 3))


def test_text(params):
    ids = jnp.asarray(np.random.default_rng(0).integers(300, 40000, (2, 8)), jnp.int32)
    plain, loop = (TextEncoder(cfg, CONFIG.dim) for cfg in (CONFIG.text, scanned(CONFIG.text)))
    assert_same(plain, loop, params["text"], ids)


def test_fusion(params):
    plain, loop = (
        FusionEncoder(cfg, CONFIG.dim) for cfg in (CONFIG.fusion, scanned(CONFIG.fusion))
    )
    mask = jnp.arange(6)[None] < jnp.array([[6], [4]])
    args = ((draw(0, 2, 8, 8, CONFIG.dim),), draw(1, 2, 6, CONFIG.dim), mask)
    assert_same(plain, loop, params["fusion"], *args)


def test_every_block_has_its_own_rate_and_key(params):
    """A rate near 1 at the last block drops its branches and leaves those of the first alone."""
    cfg = dataclasses.replace(scanned(CONFIG.vision), drop_path=1.0 - 1e-6)
    trunk, x = params["vision"]["trunk"], draw(0, 1, 112, 112, 3)

    @jax.jit
    def run(trunk: dict, key: jax.Array):
        variables = {"params": trunk}
        return VisionTransformer(cfg).apply(variables, x, False, rngs={"dropout": key})

    out = run(trunk, jax.random.key(0))
    np.testing.assert_array_equal(run(trunk, jax.random.key(0)), out)
    others = [run(trunk, jax.random.key(seed)) for seed in range(1, 6)]
    assert any(jnp.abs(other - out).max() > 1e-2 for other in others)
    for block, matters in (("block_0", True), ("block_3", False)):
        moved = trunk | {block: jax.tree.map(lambda x: 1.5 * x, trunk[block])}
        assert bool((run(moved, jax.random.key(0)) != out).any()) == matters, block


def test_dropout_in_a_loop_follows_its_key(params):
    cfg = dataclasses.replace(scanned(CONFIG.fusion), dropout=0.5)
    module = FusionEncoder(cfg, CONFIG.dim)
    args = ((draw(0, 1, 8, 8, CONFIG.dim),), draw(1, 1, 6, CONFIG.dim), jnp.ones((1, 6), bool))

    @jax.jit
    def run(key: jax.Array):
        variables, rngs = {"params": params["fusion"]}, {"dropout": key}
        return module.apply(variables, *args, deterministic=False, rngs=rngs)[0]

    first, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert jnp.abs(first - other).max() > 1e-2


def test_a_rate_may_be_an_array():
    x, key = jnp.ones((64, 3)), jax.random.key(0)
    plain, array = (
        DropPath(rate).apply({}, x, deterministic=False, rngs={"dropout": key})
        for rate in (0.5, jnp.float32(0.5))
    )
    np.testing.assert_array_equal(plain, array)
    assert (plain == 0).any()

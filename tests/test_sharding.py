"""Eight fake devices give what one gives; the rule splits what it names."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from parity import assert_close, random_params
from sam3_jax import config, sharding
from sam3_jax.models.detector import Sam3, empty_geometry, init_shapes

CONFIG = config.tiny()


def forward(params, pixels, ids):
    module = Sam3(CONFIG)
    features = module.apply({"params": params}, pixels, tracker=False, method="encode_image")
    text = module.apply({"params": params}, ids, method="encode_text")
    index = jnp.arange(len(pixels))
    geometry = empty_geometry(len(pixels))
    return module.apply(
        {"params": params}, features.detector, text, geometry, index, index, method="ground"
    )


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, (8, 112, 112, 3)).astype(np.float32)
    ids = rng.integers(300, 40000, (8, 32)).astype(np.int32)
    return random_params(CONFIG), pixels, ids


@pytest.fixture(scope="module")
def expected(inputs):
    return jax.jit(forward)(*inputs)


# Heads at tiny size: 3 (trunk), 2 (text), 4 (the rest); what the axis does not divide stays whole.
@pytest.mark.parametrize(("data", "tensor"), [(8, 1), (4, 2), (2, 4)])
def test_fake_devices_give_what_one_gives(inputs, expected, data, tensor):
    mesh = sharding.make_mesh(data, tensor)
    params, pixels, ids = inputs
    params = jax.device_put(params, sharding.param_shardings(params, mesh))
    pixels, ids = jax.device_put((pixels, ids), sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        out = jax.jit(forward)(params, pixels, ids)
    for name in ("pred_logits", "pred_boxes", "presence_logits", "pred_masks", "semantic_seg"):
        # Partial sums over the tensor axis round in another order.
        assert_close(getattr(out, name), getattr(expected, name), 2e-5, name)
    assert len(out.pred_masks.sharding.device_set) == 8


def test_every_rule_meets_a_parameter():
    mesh = sharding.make_mesh(4, 2)
    shapes = init_shapes(config.sam3())
    placed = sharding.param_shardings(shapes, mesh)
    split = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.spec
        for path, leaf in jax.tree_util.tree_flatten_with_path(placed)[0]
        if leaf.spec != PartitionSpec()
    }
    for pattern, _ in sharding.TENSOR_RULES:
        assert any(sharding.re.search(pattern, path) for path in split), pattern
    assert split["vision/trunk/block_0/attn/q/kernel"] == PartitionSpec(None, "tensor")
    assert split["decoder/layer_0/ffn/fc2/kernel"] == PartitionSpec("tensor")
    whole = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    sizes = zip(jax.tree.leaves(shapes), jax.tree.leaves(placed), strict=True)
    mine = sum(np.prod(place.shard_shape(leaf.shape)) for leaf, place in sizes)
    assert mine < 0.52 * whole  # nearly everything is split in two


def test_a_mesh_that_does_not_fit():
    with pytest.raises(ValueError, match="data=3 x tensor=2 needs 6 devices, there are 8"):
        sharding.make_mesh(3, 2)
    with pytest.raises(ValueError, match="tensor=16"):
        sharding.make_mesh(tensor=16)


def test_fsdp_splits_what_is_big():
    """The largest dimension that the tensor axis leaves; moments as their parameters."""
    mesh = sharding.make_mesh(2, 2, fsdp=2)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.shape == {"data": 2, "fsdp": 2, "tensor": 2}
    assert sharding.batch_sharding(mesh).spec == PartitionSpec(("data", "fsdp"))
    spec = functools.partial(sharding.param_spec, mesh=mesh)
    assert spec("trunk/mlp/fc1/kernel", (1024, 4736)) == PartitionSpec("fsdp", "tensor")
    assert spec("opt_state/1/mu/x/attn/out/kernel", (16, 64, 1024)) == PartitionSpec(
        "tensor", None, "fsdp"
    )
    assert spec("trunk/attn/q/kernel", (1024, 3, 64)) == PartitionSpec("fsdp")  # 3 heads: whole
    assert spec("neck/kernel", (3, 3, 257, 513)) == PartitionSpec()
    assert spec("mlp/fc1/bias", (4736,)) == PartitionSpec("tensor")
    assert spec("norm/scale", (1024,)) == PartitionSpec()  # small
    with pytest.raises(ValueError, match="data=1 x fsdp=4 x tensor=4 needs 16 devices"):
        sharding.make_mesh(1, 4, fsdp=4)
    with (
        pytest.raises(ValueError, match="a batch of 6 cannot be split over 4 devices"),
        jax.set_mesh(mesh),
    ):
        jax.eval_shape(sharding.constrain_batch, jnp.zeros((6, 2)))

"""The training step compiles ahead of time for TPU slices, fits, and every chip's host matches
alone. ``benchmarks/train.py`` compiles more cases of it.
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from benchmarks import train
from sam3_jax import config
from sam3_jax.ops.attention import attention

RESULTS = Path(train.__file__).with_name("results") / "train.json"
V5E_GB = 14  # of a chip's 16: the rest is for batches that wait and for the runtime
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='compiling for TPUs needs libtpu: pip install "jax[tpu]"',
)


@pytest.fixture(autouse=True)
def default_precision():
    """conftest asks for exact products; programs for accelerators run without."""
    with jax.default_matmul_precision("default"):
        yield


def still(model: config.ModelConfig) -> config.ModelConfig:
    """``model`` without dropout and drop path, which compile slowly."""
    model.vision.drop_path = 0.0
    for part in (model.geometry, model.fusion, model.decoder, model.scoring):
        part.dropout = 0.0
    return model


def shallow(model: config.ModelConfig) -> config.ModelConfig:
    """One or two layers of each kind, with remat."""
    model.vision.depth, model.vision.global_blocks = 2, (1,)
    model.text.depth = model.geometry.depth = model.fusion.depth = 1
    model.decoder.depth = 2
    return config.rematerialized(still(model))


def test_cases_are_read_and_refused():
    case = train.parse_case("v5e:2x8x1:16:4:full")
    assert (case.data, case.fsdp, case.images, case.prompts) == (2, 8, 16, 4)
    assert str(case) == "v5e:2x8x1:16:4:full"
    with pytest.raises(ValueError, match="'v4': choose one of"):
        train.parse_case("v4:1x1x1:1:1:full")
    with pytest.raises(ValueError, match="masks 'half': choose full, points or clips"):
        train.parse_case("v5e:1x1x1:1:1:half")


def test_collectives_are_read_off_a_program():
    text = """
  %all-gather.3 = bf16[1024,4736]{1,0:T(8,128)(2,1)} all-gather(%fusion.1), dimensions={1}
  %a = (f32[8]{0}, /*index=1*/f32[2,3]{1,0}) all-reduce-start(%x, %y), to_apply=%add
  %b = f32[8]{0} add(%all-gather.3, %a)
"""
    assert train.collectives(text) == [
        train.Collective("all-gather", ((1024, 4736),)),
        train.Collective("all-reduce", ((8,), (2, 3))),
    ]


def test_measured_cases_fit():
    rows = json.loads(RESULTS.read_text())["rows"]
    assert rows
    for row in rows:
        case = train.parse_case(row["case"])
        most = V5E_GB if case.device == "v5e" else 0.9 * train.CHIP_GB[case.device]
        assert row["total_gb"] < most, row


@needs_libtpu
@pytest.mark.slow
def test_flash_attention_compiles_where_an_axis_has_one_device():
    mesh = train.device_mesh(train.parse_case("v5e:1x4x1:4:1:full"))
    rows = jax.sharding.NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    x = jax.ShapeDtypeStruct((4, 640, 2, 64), jnp.bfloat16, sharding=rows)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile(train.QUICK)
    text = compiled.as_text()
    assert "splash" in text
    assert not train.collectives(text)


@needs_libtpu
@pytest.mark.slow
def test_the_whole_step_fits_16_chips():
    """All layers with mask losses, one image a chip.

    Compiling takes less than the 7 minutes of a core and the 12 GB here that dropout makes it.
    """
    case = train.parse_case("v5e:1x16x1:16:1:points")
    model = still(train.model_config(case))
    compiled = train.compile_step(model, train.device_mesh(case), case, quick=True)
    assert train.measure(compiled)["total_gb"] < V5E_GB
    sent = train.collectives(compiled.as_text())
    assert sent
    for collective in sent:
        for shape in collective.shapes:
            # The matrices of 24 text blocks, or of 4 groups of 7 window blocks, are never sent in
            # one piece: it would take the memory that splitting them saves.
            stacked = shape[:1] == (24,) or shape[:2] == (4, 7)
            assert not (stacked and math.prod(shape) > 1 << 20), collective


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("method", ["host", "device"])
def test_every_chip_matches_its_own_prompts(method):
    """Chips exchange parameters, gradients and sums, but neither costs nor matches."""
    case = train.parse_case("v5e:1x4x1:4:2:full")
    model = shallow(config.tiny())
    compiled = train.compile_step(
        model, train.device_mesh(case), case, method=method, mask_side=32, quick=True
    )
    text = compiled.as_text()
    assert ("is_host_transfer=true" in text) == (method == "host")
    sent = train.collectives(text)
    assert {"all-reduce"} <= {collective.kind for collective in sent}
    for collective in sent:
        for shape in collective.shapes:
            # Costs and one-to-many matches are queries x targets, the matcher's answer targets.
            assert train.TARGETS not in shape, collective


@needs_libtpu
@pytest.mark.slow
def test_the_trackers_step_compiles_and_keeps_clips_on_their_chips():
    """A cut-down model: no frame, mask or memory map is sent to another chip."""
    case = train.parse_case("v5e:1x4x1:4:2:clips")
    model = shallow(config.tiny())
    model.memory.attention_depth = model.memory.fuser_depth = model.sam.depth = 1
    model.image_size = 168  # a grid of 12: no width of the model is like a side of its maps
    mesh = train.device_mesh(case)
    compiled = train.compile_step(model, mesh, case, mask_side=24, quick=True)
    held = {(side, side) for side in (12, 24, 48, 168)}
    for collective in train.collectives(compiled.as_text()):
        for shape in collective.shapes:
            sent = {shape[i : i + 2] for i in range(len(shape) - 1)}
            assert not sent & held, collective

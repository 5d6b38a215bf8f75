"""The full forward compiles ahead of time for TPUs, and a batch of eight fits the smallest one."""

from __future__ import annotations

import importlib.util
import re

import jax
import pytest

from benchmarks.aot import compile_forward, device_mesh, measure, parse_case
from sam3_jax import config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason='compiling for TPUs needs libtpu: pip install "jax[tpu]"',
    ),
]
CONFIG = config.sam3()
# A v5e chip has 16 GB (16 GiB less what the runtime keeps): 15.75 GiB as XLA reports it.
V5E_BYTES = 15.75 * 2**30
# 32 blocks of the trunk and 6 layers of the fusion encoder attend with splash; the rest is small
# or has a bias.
SPLASH_CALLS = CONFIG.vision.depth + CONFIG.fusion.depth


def compile_case(case: str) -> jax.stages.Compiled:
    parsed = parse_case(case)
    # conftest asks for exact products; programs for accelerators run without. Quick: the memory of
    # the batch of eight is the same to a percent, the compilation takes a third of the time.
    with jax.default_matmul_precision("default"):
        return compile_forward(CONFIG, device_mesh(parsed), parsed.batch, quick=True)


def splash_calls(compiled: jax.stages.Compiled) -> int:
    """Pallas kernels in the compiled program that are splash attention."""
    lines = compiled.as_text().splitlines()
    return sum('custom_call_target="tpu_custom_call"' in s and "splash" in s for s in lines)


def test_batch_of_eight_fits_one_v5e_chip():
    compiled = compile_case("v5e:1x1:8")
    needs = measure(compiled)
    assert needs["total_gb"] * 1e9 < V5E_BYTES, needs
    assert splash_calls(compiled) == SPLASH_CALLS


@pytest.mark.parametrize("case", ["v6e:1x1:1", "v5e:4x2:8", "v6e:2x4:8"])
def test_compiles(case):
    """One chip of the other kind; several over (data, tensor)."""
    compiled = compile_case(case)
    assert splash_calls(compiled) == SPLASH_CALLS
    parsed = parse_case(case)
    if parsed.data * parsed.tensor == 1:
        return
    # Split heads and hidden units come together again in sums over the tensor axis, but no
    # attention and no feature of one image is gathered onto all chips.
    text = compiled.as_text()
    assert re.search(r"all-reduce(-start)?\(|reduce-scatter", text)
    alone = measure(compiled)["arguments_gb"]
    whole = sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(compiled.args_info)) / 1e9
    assert alone < 0.7 * whole  # the parameters and the batch are split

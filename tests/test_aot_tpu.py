"""The full forward compiles ahead of time for TPUs, and a batch of eight fits the smallest one."""

from __future__ import annotations

import importlib.util

import jax
import pytest

from benchmarks.aot import Case, arguments, compile_forward, device_mesh, measure, parse_case
from sam3_jax import config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason='compiling for TPUs needs libtpu: pip install "jax[tpu]"',
    ),
]
CONFIG = config.sam3()
V5E_BYTES = 15.75e9  # of a chip's 16 GB, less what the runtime keeps
# 32 blocks of the trunk and 6 layers of the fusion encoder attend with splash; the rest is small
# or has a bias.
SPLASH_CALLS = CONFIG.vision.depth + CONFIG.fusion.depth


def compile_case(case: Case) -> jax.stages.Compiled:
    # conftest asks for exact products; programs for accelerators run without. Quick: the batch of
    # eight needs 4.2 GB either way, and compiling takes a third of the time.
    with jax.default_matmul_precision("default"):
        return compile_forward(CONFIG, device_mesh(case), case.batch, quick=True)


def splash_calls(compiled: jax.stages.Compiled) -> int:
    """Pallas kernels in the compiled program that are splash attention."""
    lines = compiled.as_text().splitlines()
    return sum('custom_call_target="tpu_custom_call"' in s and "splash" in s for s in lines)


def test_batch_of_eight_fits_one_v5e_chip():
    compiled = compile_case(parse_case("v5e:1x1:8"))
    needs = measure(compiled)
    assert needs["total_gb"] * 1e9 < V5E_BYTES, needs
    assert splash_calls(compiled) == SPLASH_CALLS


@pytest.mark.parametrize("case", ["v6e:1x1:1", "v5e:4x2:8", "v6e:2x4:8"])
def test_compiles(case):
    """One chip of the other kind; several over (data, tensor)."""
    parsed = parse_case(case)
    compiled = compile_case(parsed)
    assert splash_calls(compiled) == SPLASH_CALLS
    args = arguments(CONFIG, device_mesh(parsed), parsed.batch)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(args))
    held = measure(compiled)["arguments_gb"] * 1e9
    if parsed.tensor == 1:
        assert held >= whole
    else:
        # Nine tenths of the parameters are split by the tensor axis.
        assert held < (0.1 + 1 / parsed.tensor) * whole
        # Partial products of split heads and hidden units are summed over it; nothing is gathered.
        text = compiled.as_text()
        assert "all-reduce" in text
        assert "all-gather" not in text
        assert "all-to-all" not in text

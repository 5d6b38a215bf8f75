"""The training step compiles ahead of time for TPU slices: it fits, and every host matches alone."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jax
import pytest

from benchmarks import train
from sam3_jax import config
from sam3_jax.training.step import StepConfig

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='compiling for TPUs needs libtpu: pip install "jax[tpu]"',
)
V5E_GB = 14  # of a chip's 16: the rest is for batches that wait and for the runtime
RESULTS = Path(train.__file__).with_name("results") / "train.json"


def compile_case(case: train.Case, model: config.ModelConfig, **options) -> jax.stages.Compiled:
    # conftest asks for exact products; programs for accelerators run without.
    with jax.default_matmul_precision("default"):
        return train.compile_step(model, train.device_mesh(case), case, quick=True, **options)


def assert_matched_by_shard(text: str, queries: int) -> None:
    """No chip sends costs or matches (queries x targets) to another, whatever else it sends."""
    sent = train.collectives(text)
    assert sent, "chips exchange nothing: the program is not sharded, or the test reads it wrongly"
    for collective in sent:
        for shape in collective.shapes:
            assert not {queries, train.TARGETS} <= set(shape), collective


@needs_libtpu
@pytest.mark.slow
def test_full_size_fits_sixteen_v5e_chips():
    case = train.parse_case("v5e:1x16x1:16:1:points")
    compiled = compile_case(case, train.model_config())
    needs = train.measure(compiled)
    assert needs["total_gb"] < V5E_GB, needs

"""The released size, there and back: exact, and within the memory that was promised."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import oracle
from sam3_jax.convert.source import open_source

ROOT = Path(__file__).parents[1]
# Not getrusage for the peak: its maximum survives exec, and so holds what pytest had taken.
MEASURE = """
import json, re, resource, sys, time
{code}
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
print(json.dumps({{"peak": peak, **measured}}))
"""
RUN = """
from sam3_jax.convert.cli import main
start = time.process_time()
assert main(sys.argv[1:]) == 0
measured = dict(seconds=time.process_time() - start)
"""
LOAD = """
import jax
from sam3_jax import checkpoint
events = []
jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF)
params = checkpoint.load(sys.argv[1]).params
seconds, after = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF)
measured = dict(
    seconds=seconds,
    touched=(after.ru_minflt - before.ru_minflt) * resource.getpagesize(),
    compiled=sum("backend_compile" in name for name in events),
)
jax.jit(lambda x: x + 1)(1.0)
assert any("backend_compile" in name for name in events)  # or nothing was counted
"""


def measured(code: str, *arguments: str | Path) -> dict[str, float]:
    """Runs code in a process of its own.

    Returns its peak memory in bytes and its CPU seconds, which are for the reader; of a load also
    the bytes of fresh memory that it touched and how many programs it compiled.
    """
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.format(code=code), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Ten gigabytes go here; pytest would keep them."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
def test_the_released_size_there_and_back(folder: Path):
    source, ckpt, back = folder / "sam3.pt", folder / "ckpt", folder / "back.pt"
    oracle.fake_sam3_pt(source, seed=0, wrapped=True)
    size = source.stat().st_size
    assert size > 3.4e9

    there = measured(RUN, "--input", source, "--output", ckpt)
    assert there["peak"] < 2 * size
    loaded = measured(LOAD, ckpt)
    assert loaded["peak"] < 2 * size
    # What takes a load's time: each parameter is touched twice, read and put on the device, and no
    # program is compiled. Seconds would tell more of the machine: 6 to 18 s for the same work.
    assert 0 < loaded["touched"] < 2.5 * size
    assert loaded["compiled"] == 0
    measured(RUN, "--input", ckpt, "--output", back, "--to-torch")

    original, exported = open_source(str(source)).tensors, open_source(str(back)).tensors
    assert sorted(exported) == sorted(original)
    assert len(original) == 1465
    for name, array in original.items():
        assert exported[name].dtype == array.dtype, name
        assert np.array_equal(exported[name], array), name
    print({"convert": there, "load": loaded})

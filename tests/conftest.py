"""What every test runs under: eight fake CPU devices, exact matmuls, checked shapes.

Set SAM3_JAX_TEST_PLATFORM (for example ``cuda``) to run on another platform of jax.
"""

from __future__ import annotations

import os
import sys
import tempfile

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could choose its platform")

PLATFORM = os.environ.get("SAM3_JAX_TEST_PLATFORM", "cpu")
DEVICES = 8

# Environment variables rather than jax.config, so that processes which tests start agree.
os.environ["JAX_PLATFORMS"] = PLATFORM
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"  # as torch computes float32
_flags = [os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={DEVICES}"]
os.environ["XLA_FLAGS"] = " ".join(_flags).strip()
if PLATFORM == "cpu":
    # Tiny programs compile longer than they run: without LLVM's optimisations 40% less CPU time.
    # Modules marked ``optimised`` have them, though processes that they start have not.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Compiling ahead of time for a TPU must not ask a metadata server which TPU this machine is.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # by test processes side by side
os.environ["SAM3_JAX_CACHE_DIR"] = "off"  # no compiled programs in the user's cache folder
# One of the run's own instead, for all its processes: tests compile the same programs again and
# again. Workers of pytest-xdist and what tests start inherit it. The Makefile gives one that all
# runs share.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.TemporaryDirectory(prefix="sam3_jax_test_programs_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the oracles have random weights: no download

from collections.abc import Iterator  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# From here on every annotated shape and dtype of the package is checked at each call.
install_import_hook("sam3_jax", "beartype.beartype")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where jax does not run on one."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not PLATFORM.startswith(("cuda", "gpu")):
        skip = pytest.mark.skip(reason="needs a GPU: run with SAM3_JAX_TEST_PLATFORM=cuda")
        for item in marked:
            item.add_marker(skip)


@pytest.fixture(scope="module", autouse=True)
def _optimised(request: pytest.FixtureRequest) -> Iterator[None]:
    """All optimisations for a module that is marked ``optimised``: it runs for longer than it
    compiles."""
    option = "jax_disable_most_optimizations"
    quick = jax.config.read(option)
    jax.config.update(option, quick and not request.node.get_closest_marker("optimised"))
    yield
    jax.config.update(option, quick)


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers, the same in every run and for every test."""
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """Torch's threads wait for each other nine tenths of the time at toy sizes."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

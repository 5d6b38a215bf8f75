"""What users install: the wheel with its data, its dependencies and its programs."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from sam3_jax.ops import boxes

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_shapes_are_checked():
    """The import hook of conftest.py is on: tests that pass have passed with right shapes."""
    with pytest.raises(jaxtyping.TypeCheckError, match="cxcywh_to_xyxy"):
        boxes.cxcywh_to_xyxy(jnp.zeros((3, 5)))


def test_tests_run_on_eight_devices_with_exact_matmuls():
    assert jax.config.jax_default_matmul_precision == "highest"
    if jax.default_backend() == "cpu":
        assert jax.device_count() == 8


@pytest.mark.parametrize(("name", "target"), PROJECT["scripts"].items())
def test_programs_exist(name, target):
    module, function = target.split(":")
    assert callable(getattr(importlib.import_module(module), function)), name


@pytest.mark.slow
def test_a_wheel_works_in_an_empty_environment(tmp_path):
    """The package runs on its declared dependencies alone, far from the checkout."""

    def run(*command: str | Path) -> str:
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            list(map(str, command)), cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    package = ROOT / "sam3_jax"
    data = [p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    missing = {str(p.relative_to(ROOT)) for p in data} - set(zipfile.ZipFile(wheel).namelist())
    assert not missing

    run(sys.executable, "-m", "venv", "env")
    run("env/bin/python", "-m", "pip", "install", "-q", "--no-compile", wheel)
    run("env/bin/python", "-c", "import sam3_jax")
    installed = {line.split("==")[0].lower() for line in run("env/bin/pip", "freeze").splitlines()}
    assert not {"torch", "tensorflow", "transformers"} & installed
    for name in PROJECT["scripts"]:
        assert "--" in run(f"env/bin/{name}", "--help")

"""``infer.py`` in this process, on an engine that is there already."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sam3_jax.inference import bulk, cli
from sam3_jax.inference.engine import Engine


def caller(engine: Engine, patch: pytest.MonkeyPatch, output: Path) -> Callable[..., int]:
    """Runs the command with these arguments, writing to ``output``."""
    patch.setattr(bulk, "load_engine", lambda path, dtype, resolution: engine)

    def call(*arguments: str | Path) -> int:
        common = ["--checkpoint", "somewhere", "--output", str(output)]
        return cli.main([*common, *map(str, arguments)])

    return call

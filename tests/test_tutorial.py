"""The tutorial's commands do what it says: every block of it, in its order, in a fresh folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sam3_jax.demo import weights

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
CLONE = ("infer.py", "evaluate.py", "train.py", "configs", "sam3_jax")
TIMEOUT = 1200  # seconds a block, for machines that do other things too


def run(language: str, code: str, folder: Path) -> str:
    """Runs a block as a reader would; returns what it printed."""
    command = ["bash", "-euc", code] if language == "bash" else [sys.executable, "-c", code]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cache = str(folder / "cache")
    changed = {"PATH": path, "SAM3_JAX_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
    # One device and every optimisation, as outside of tests.
    changed |= {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | changed,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def figures(folder: Path) -> dict[str, float]:
    """What ``evaluate.py`` measured."""
    return json.loads((folder / "metrics.json").read_text())["metrics"]


@pytest.mark.slow
def test_every_block(tmp_path):
    for name in CLONE:
        (tmp_path / name).symlink_to(ROOT / name)
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert len(blocks) == 10
    printed = [run(language, code, tmp_path) for language, code in blocks]

    out = tmp_path / "out"
    assert "answers are right" in printed[0]
    assert weights.KNOWN in printed[1]
    for name in ("phrase", "box", "click", "clicks"):
        (answer,) = (out / name).glob("*_overlay.png")
        assert answer.stat().st_size > 10_000
        assert json.loads((out / name / "results.json").read_text())["annotations"], name
    assert "crosses" in printed[4]
    followed = json.loads((out / "video" / "clip_tracks.json").read_text())["annotations"]
    assert len(followed) >= 3  # two hearts and a crescent
    assert (out / "video" / "clip_overlay.mp4").stat().st_size > 10_000
    (pointed,) = json.loads((out / "pointed" / "clip_tracks.json").read_text())["annotations"]
    assert sum(mask is not None for mask in pointed["segmentations"]) > 8
    folder = json.loads((out / "folder" / "results.json").read_text())
    assert {image["status"] for image in folder["images"]} == {"ok"}
    assert figures(out / "figures")["segm/cgF1"] > 0
    before, after = figures(out / "before"), figures(out / "after")
    assert before["segm/cgF1"] < 0.1  # "coin" is a word of random values
    assert after["segm/cgF1"] > 0.3
    found = json.loads((out / "coin" / "results.json").read_text())["annotations"]
    assert len(found) > 8  # of 24, half of which were trained on; 11 where this was measured

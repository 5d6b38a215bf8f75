"""The real weights and files of the opt-in tests, and how alike two results of them are."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from sam3_jax import checkpoint
from sam3_jax.convert.convert import convert
from sam3_jax.convert.source import open_source
from sam3_jax.inference.postprocess import Detections
from sam3_jax.video.display import VideoFrame

CHECKPOINT_VARIABLE, IMAGES_VARIABLE = "SAM3_JAX_REAL_CHECKPOINT", "SAM3_JAX_REAL_IMAGES"

# The figures have four decimals and transformers holds itself to 1e-4 + 1e-4 |x|. Another framework
# adds in another order: 1e-4 of the spread of an output is allowed, taken as 10 for the logits of
# queries, 50 for those of masks and 2 for the rest. A departure or a wrong wire costs percents.
LOGITS, MASK_LOGITS, FRACTIONS = 1e-3, 5e-3, 2e-4


def skip_unless_given(names: Iterable[str]) -> None:
    """Skips the module that is being imported where the variables are not set.

    ``names``: of the files that it needs.
    """
    if not (os.environ.get(CHECKPOINT_VARIABLE) and os.environ.get(IMAGES_VARIABLE)):
        pytest.skip(
            f"needs the real weights: set {CHECKPOINT_VARIABLE} to sam3.pt, Hugging Face's folder "
            f"or a converted one, and {IMAGES_VARIABLE} to a folder with {', '.join(names)} "
            "(addresses in tests/real_figures.py)",
            allow_module_level=True,
        )


def real_files(addresses: Mapping[str, str]) -> dict[str, Path]:
    """Paths of files by the names that they must have; fails with addresses of missing ones."""
    folder = Path(os.environ[IMAGES_VARIABLE])
    missing = [
        f"{url} as {name}" for name, url in addresses.items() if not (folder / name).exists()
    ]
    if missing:
        pytest.fail(f"{folder} lacks files; download " + ", ".join(missing), pytrace=False)
    return {name: folder / name for name in addresses}


@functools.cache
def real_checkpoint() -> checkpoint.Loaded:
    """Everything of the checkpoint, in float32, once for all modules of a process."""
    path = Path(os.environ[CHECKPOINT_VARIABLE])
    if checkpoint.is_checkpoint(path):
        return checkpoint.load(path)
    with tempfile.TemporaryDirectory(prefix="sam3_jax_real_") as folder:
        converted = Path(folder) / "checkpoint"
        convert(open_source(str(path)), converted)
        return checkpoint.load(converted)


class Agreement(NamedTuple):
    """How two sets of as many detections differ, each with its best partner."""

    mask_iou: np.ndarray
    boxes: np.ndarray  # largest difference of a side, pixels
    scores: np.ndarray


def mask_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, h, w) and (m, h, w) -> (n, m)."""
    return np.array([[(x & y).sum() / max((x | y).sum(), 1) for y in b] for x in a])


def compare(a: Detections | VideoFrame, b: Detections | VideoFrame) -> Agreement:
    """Of an image, or of a frame."""
    assert len(a.scores) == len(b.scores) > 0, (a.scores, b.scores)
    overlap = mask_iou(a.masks, b.masks)
    i, j = linear_sum_assignment(-overlap)
    return Agreement(
        overlap[i, j], np.abs(a.boxes[i] - b.boxes[j]).max(1), np.abs(a.scores[i] - b.scores[j])
    )

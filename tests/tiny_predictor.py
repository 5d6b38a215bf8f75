"""An ImagePredictor of a toy model with random weights, one for all tests of a process.

Compiling is what takes time (seconds a program), so the tests share it and keep to few sizes:
no box or 2 to 4 boxes, one prompt or 3 to 4.
"""

from __future__ import annotations

import functools

import jax
import numpy as np

from sam3_jax import config as configs
from sam3_jax.inference.image import ImagePredictor
from sam3_jax.models.detector import init_shapes


def config() -> configs.ModelConfig:
    """``tiny`` with every stack as short as it can be: one layer, windowed and global blocks."""
    short = configs.tiny()
    short.vision.depth, short.vision.global_blocks = 2, (1,)
    for part in (short.text, short.geometry, short.fusion, short.decoder, short.sam):
        part.depth = 1
    return short


@functools.cache
def params() -> dict:
    """Random values that keep activations near 1, for every parameter (quicker than ``init``)."""
    rng = np.random.default_rng(0)

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        noise = rng.normal(size=leaf.shape).astype(leaf.dtype)
        if name == "kernel":
            return noise / np.prod(leaf.shape[:-1]).astype(leaf.dtype) ** 0.5
        return 1 + 0.1 * noise if name == "scale" else 0.3 * noise

    return jax.tree_util.tree_map_with_path(fill, init_shapes(config()))


@functools.cache
def predictor() -> ImagePredictor:
    """In float32; whoever uses it sets an image first."""
    return ImagePredictor(params(), config(), dtype="float32")

"""What parity tests share: the comparison, and the model's entry points, jitted."""

from __future__ import annotations

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sam3_jax.config import ModelConfig
from sam3_jax.models.detector import Sam3, empty_geometry, init_shapes
from sam3_jax.types import ClickPrompt, Geometry, TextFeatures

# Two float32 programs that add in different orders, a few layers deep: about 1e-6 of the spread a
# layer. A wrong wire costs percents.
TINY = 5e-5
# The same through 32 + 6 + 6 layers of the released size, where attention is sharper.
FULL = 1e-3


def assert_close(
    actual: jax.Array | np.ndarray,
    expected: jax.Array | np.ndarray,
    share: float,
    name: str = "",
    *,
    spread: float | None = None,
) -> float:
    """Asserts equal shapes and a largest difference of ``share`` of the expected spread.

    ``spread``: that of the whole where ``expected`` is a part of something.

    Returns the largest difference as a share of the spread.
    """
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    chex.assert_equal_shape([actual, expected])
    assert np.isfinite(expected).all(), f"{name}: the oracle is not finite"
    spread = float(np.ptp(expected)) if spread is None else spread
    assert spread > 0, f"{name}: the oracle is constant, so this compares nothing"
    chex.assert_trees_all_close({name: actual}, {name: expected}, atol=share * spread, rtol=0)
    return float(np.abs(actual - expected).max()) / spread


class Model:
    """Sam3 with fixed parameters; every method is one jitted program a shape."""

    def __init__(self, config: ModelConfig, params: dict, dtype: DTypeLike = jnp.float32) -> None:
        self.config, self.params = config, jax.tree.map(jnp.asarray, params)
        self.module = Sam3(config, dtype)

    @functools.cache  # noqa: B019  (models live as long as the tests that share them)
    def _jit(self, method: str, **static: bool) -> Callable:
        def run(params: dict, *args: object):
            return self.module.apply({"params": params}, *args, method=method, **static)

        return jax.jit(run)

    def __call__(self, method: str, *args: object, **static: bool):
        return self._jit(method, **static)(self.params, *args)


def geometry(
    prompts: int,
    boxes: np.ndarray | None = None,
    box_labels: np.ndarray | None = None,
    points: np.ndarray | None = None,
    point_labels: np.ndarray | None = None,
    *,
    box_mask: np.ndarray | None = None,
    point_mask: np.ndarray | None = None,
) -> Geometry:
    """Geometry from what a test gives; everything valid unless masked."""
    out = empty_geometry(prompts)
    for kind, values, labels, mask in (
        ("box", boxes, box_labels, box_mask),
        ("point", points, point_labels, point_mask),
    ):
        if values is not None:
            shape = values.shape[:2]
            labels = np.ones(shape, np.int32) if labels is None else labels
            fields = {
                kind + ("es" if kind == "box" else "s"): jnp.asarray(values, jnp.float32),
                f"{kind}_labels": jnp.asarray(labels, jnp.int32),
                f"{kind}_mask": jnp.ones(shape, bool) if mask is None else jnp.asarray(mask),
            }
            out = out._replace(**fields)
    return out


def click_prompt(
    side: int,
    points: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    box: np.ndarray | None = None,
    mask_input: np.ndarray | None = None,
    *,
    length: int = 8,
) -> ClickPrompt:
    """One click prompt, padded to ``length`` points, the box's corners first."""
    xy, marks = np.zeros((length, 2), np.float32), np.full(length, -2, np.int32)
    given = np.zeros((0, 2)) if points is None else np.asarray(points)
    signs = np.zeros(0) if labels is None else np.asarray(labels)
    if box is not None:
        given = np.concatenate([np.reshape(box, (2, 2)), given])
        signs = np.concatenate([[2, 3], signs])
    xy[: len(given)], marks[: len(given)] = given, signs
    mask = np.zeros((side, side), np.float32) if mask_input is None else mask_input
    return ClickPrompt(
        jnp.asarray(xy)[None],
        jnp.asarray(marks)[None],
        jnp.asarray(mask)[None],
        jnp.asarray([mask_input is not None]),
    )


def text_features(tokens: np.ndarray, mask: np.ndarray) -> TextFeatures:
    """Text features from numpy."""
    return TextFeatures(jnp.asarray(tokens), jnp.asarray(mask))


def random_params(config: ModelConfig, seed: int = 0) -> dict:
    """Seeded parameters for tests without an oracle: no path is switched off by a zero."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = rng.standard_normal(leaf.shape, np.float32)
        match path[-1].key:
            case "kernel":
                out = leaf.shape[-1] if path[-2].key == "out" else np.prod(leaf.shape[1:])
                fan_in = leaf.size / out if len(leaf.shape) < 4 else np.prod(leaf.shape[:3])
                return values / np.sqrt(fan_in, dtype=np.float32)
            case "scale":
                return 1 + 0.1 * values
            case "bias":
                return 0.1 * values
            case _:
                return 0.5 * values

    return jax.tree_util.tree_map_with_path(draw, init_shapes(config))

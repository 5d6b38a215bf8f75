"""Sampling and resizing of maps: RoIAlign, point sampling, bilinear resize.

RoIAlign and bilinear point sampling are separable: each is a small matrix of row weights and one
of column weights around the map, so both run as matrix products, without gathers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _linear_weights(position: Float[Array, "*n"], size: int) -> Float[Array, "*n s"]:
    """Weights of linear interpolation at ``position`` (cell units) over ``size`` cells."""
    return jnp.maximum(0.0, 1.0 - jnp.abs(position[..., None] - jnp.arange(size)))


def _bin_weights(
    low: Float[Array, "*n"], high: Float[Array, "*n"], bins: int, size: int
) -> Float[Array, "*n k s"]:
    """Row (or column) weights of RoIAlign: the mean of the samples of each of ``bins`` bins."""
    extent = jnp.maximum(high - low, 1.0)
    step = extent / bins
    count = jnp.ceil(step)  # samples a bin, as sampling_ratio=-1 asks
    limit = -(-3 * size // (2 * bins))  # boxes up to 1.5 times the map are sampled exactly
    sample = jnp.arange(limit)
    start = low[..., None] + jnp.arange(bins) * step[..., None]
    offset = (sample + 0.5) * (step / count)[..., None]
    position = start[..., None] + offset[..., None, :]
    counted = (sample < count[..., None])[..., None, :]
    inside = (position >= -1.0) & (position <= size)  # torchvision drops samples further out
    weights = _linear_weights(jnp.clip(position, 0.0, size - 1), size)
    weights = jnp.where((counted & inside)[..., None], weights, 0.0)
    return weights.sum(axis=-2) / jnp.minimum(count, limit)[..., None, None]


def roi_align(
    features: Float[Array, "p h w d"], boxes: Float[Array, "p n 4"], size: int
) -> Float[Array, "p n k k d"]:
    """RoIAlign with ``aligned=False``, scale 1 and the adaptive sampling ratio of torchvision.

    Args:
      features: one map for each row of ``boxes``.
      boxes: (x0, y0, x1, y1) in cells of the map.
      size: bins a side.
    """
    height, width = features.shape[1:3]
    boxes = boxes.astype(jnp.float32)
    rows = _bin_weights(boxes[..., 1], boxes[..., 3], size, height)
    cols = _bin_weights(boxes[..., 0], boxes[..., 2], size, width)
    exact = jax.lax.Precision.HIGHEST
    half = jnp.einsum("pnyh,phwd->pnywd", rows, features.astype(jnp.float32), precision=exact)
    return jnp.einsum("pnxw,pnywd->pnyxd", cols, half, precision=exact)


def sample_points(
    features: Float[Array, "p h w d"], points: Float[Array, "p n 2"]
) -> Float[Array, "p n d"]:
    """Bilinear sample at (x, y) fractions of the map; zero outside.

    Equals torch's ``grid_sample`` with ``align_corners=False`` and zero padding.
    """
    height, width = features.shape[1:3]
    points = points.astype(jnp.float32)
    rows = _linear_weights(points[..., 1] * height - 0.5, height)
    cols = _linear_weights(points[..., 0] * width - 0.5, width)
    exact = jax.lax.Precision.HIGHEST
    half = jnp.einsum("pnh,phwd->pnwd", rows, features.astype(jnp.float32), precision=exact)
    return jnp.einsum("pnw,pnwd->pnd", cols, half, precision=exact)


def resize_bilinear(
    x: Float[Array, "b h w d"], size: tuple[int, int], *, antialias: bool = False
) -> Float[Array, "b h2 w2 d"]:
    """Bilinear resize with half-pixel centres, as torch's ``interpolate(align_corners=False)``."""
    if x.shape[1:3] == size:
        return x
    shape = (x.shape[0], *size, x.shape[3])
    return jax.image.resize(x, shape, "bilinear", antialias=antialias)


def resize_nearest(x: Float[Array, "b h w d"], size: tuple[int, int]) -> Float[Array, "b h2 w2 d"]:
    """Nearest resize, source index = floor(i * source / target), as torch's ``mode="nearest"``."""
    for axis, target in zip((1, 2), size, strict=True):
        source = x.shape[axis]
        if target % source == 0:
            x = jnp.repeat(x, target // source, axis=axis)
        else:
            x = jnp.take(x, jnp.arange(target) * source // target, axis=axis)
    return x

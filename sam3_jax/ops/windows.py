"""Non-overlapping attention windows (upstream ``window_partition`` in ``sam3/model/vitdet.py``)."""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float


def partition(x: Float[Array, "b h w d"], window: int) -> Float[Array, "bw s s d"]:
    """Cuts a map into windows, image by image, row-major; zero-pads bottom and right if needed."""
    pad_h, pad_w = -x.shape[1] % window, -x.shape[2] % window
    if pad_h or pad_w:
        x = jnp.pad(x, ((0, 0), (0, pad_h), (0, pad_w), (0, 0)))
    return rearrange(x, "b (i s) (j t) d -> (b i j) s t d", s=window, t=window)


def unpartition(
    windows: Float[Array, "bw s s d"], height: int, width: int
) -> Float[Array, "b h w d"]:
    """Inverse of :func:`partition` for a map of ``height`` x ``width``; drops the padding."""
    side = windows.shape[1]
    rows, cols = -(-height // side), -(-width // side)
    x = rearrange(windows, "(b i j) s t d -> b (i s) (j t) d", i=rows, j=cols)
    return x[:, :height, :width]

"""Small holes are filled and specks removed, on the device.

Upstream: ``fill_holes_in_mask_scores`` in ``sam3/model/sam3_tracker_utils.py``, which needs a
compiled kernel for connected components. Here a component only has to be known if it is small, so
a fixed number of sweeps decides it exactly.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from sam3_jax.tracking.concepts.overlap import mask_areas

FILLED, REMOVED = 0.1, -0.1  # logits


def _neighbourhood_max(x: Int[Array, "n h w"]) -> Int[Array, "n h w"]:
    """Largest value among a pixel and its eight neighbours; values are >= 0."""
    for axis in (1, 2):
        pads = [(0, 0)] * 3
        pads[axis] = (1, 1)
        padded = jnp.pad(x, pads)
        n = x.shape[axis]
        parts = [lax.slice_in_dim(padded, k, k + n, axis=axis) for k in range(3)]
        x = jnp.maximum(jnp.maximum(*parts[:2]), parts[2])
    return x


def small_components(
    masks: Bool[Array, "n h w"], max_area: int, limit: Int[Array, " n"]
) -> Bool[Array, "n h w"]:
    """Pixels of the 8-connected components of at most ``min(max_area, limit)`` pixels.

    Every pixel takes the largest index within ``max_area`` - 1 steps inside its mask. A component
    of at most ``max_area`` pixels then carries one label; conversely pixels of one label that touch
    no other label are a whole component, and its size is their number.

    Args:
      max_area: static; costs one sweep a pixel.
      limit: a mask's own bound.
    """
    n, height, width = masks.shape
    index = jnp.arange(1, height * width + 1, dtype=jnp.int32).reshape(1, height, width)
    labels = jnp.where(masks, index, 0)

    def sweep(_: Array, labels: Array) -> Array:
        return jnp.where(masks, _neighbourhood_max(labels), 0)

    labels = lax.fori_loop(0, max_area - 1, sweep, labels)
    # In a finished component no pixel sees another label. Labels of the background are 0, so a
    # smaller one is looked for through the distance from above.
    top = height * width + 1
    lowest = top - _neighbourhood_max(jnp.where(masks, top - labels, 0))
    torn = masks & ((_neighbourhood_max(labels) != labels) | (lowest != labels))
    rows = jnp.arange(n)[:, None]
    flat = labels.reshape(n, -1)
    # A torn pixel makes its label's count larger than any area that is asked for.
    weight = jnp.where(torn, max_area + 1, masks.astype(jnp.int32)).reshape(n, -1)
    counts = jnp.zeros((n, top), jnp.int32).at[rows, flat].add(weight)
    area = counts[rows, flat].reshape(masks.shape)
    return masks & (area <= jnp.minimum(limit, max_area)[:, None, None])


def clean_masks(logits: Float[Array, "n h w"], max_area: int) -> Float[Array, "n h w"]:
    """Holes of at most ``max_area`` pixels become +.1, then specks -.1.

    A speck has at most ``max_area`` pixels and at most half of its mask's: small objects stay.
    Pieces are 8-connected; the background outside an image's edge is not looked at, so a small
    corner that an object cuts off is a hole. ``max_area`` 0 changes nothing.
    """
    if max_area <= 0:
        return logits
    everything = jnp.full(len(logits), max_area, jnp.int32)
    logits = jnp.where(small_components(logits <= 0, max_area, everything), FILLED, logits)
    foreground = logits > 0
    half = mask_areas(foreground) // 2
    return jnp.where(small_components(foreground, max_area, half), REMOVED, logits)

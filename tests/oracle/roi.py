"""RoIAlign as torchvision's compiled kernel computes it, for the oracle.

``torchvision.ops.roi_align`` needs compiled operators, and its pure-Python fallback departs from
them (samples more than one cell outside the map repeat the border instead of counting as zero)
and takes gigabytes at full size. Bilinear sampling on a grid is separable, so one box is two
small matrix products.
"""

from __future__ import annotations

import math

import torch


def _bins(start: torch.Tensor, end: torch.Tensor, bins: int, size: int) -> torch.Tensor:
    """Weights (bins, size) that average a box side's bilinear samples bin by bin."""
    length = (end - start).clamp(min=1.0)
    bin_size = length / bins
    samples = max(math.ceil(bin_size.item()), 1)
    offsets = (torch.arange(samples, dtype=start.dtype) + 0.5) * bin_size / samples
    where = start + torch.arange(bins, dtype=start.dtype)[:, None] * bin_size + offsets
    inside = (where >= -1.0) & (where <= size)
    where = where.clamp(min=0, max=size - 1)
    low = where.floor().long()
    high = (low + 1).clamp(max=size - 1)
    share = where - low
    one_hot = torch.nn.functional.one_hot
    weights = one_hot(low, size) * (1 - share)[..., None] + one_hot(high, size) * share[..., None]
    return (weights * inside[..., None]).mean(1)


def roi_align(features: torch.Tensor, boxes: list[torch.Tensor], output_size: int) -> torch.Tensor:
    """Same values as ``torchvision.ops.roi_align(features, boxes, output_size)``.

    Args:
      features: (b, c, h, w).
      boxes: b tensors (n, 4), xyxy in cells of the map.

    Returns:
      (sum of n, c, output_size, output_size), all boxes of the first image first.
    """
    height, width = features.shape[-2:]
    pooled = [
        torch.einsum(
            "yh,chw,xw->cyx",
            _bins(box[1], box[3], output_size, height),
            image,
            _bins(box[0], box[2], output_size, width),
        )
        for image, image_boxes in zip(features, boxes, strict=True)
        for box in image_boxes
    ]
    if not pooled:
        return features.new_zeros(0, features.shape[1], output_size, output_size)
    return torch.stack(pooled)

"""Runs the memory parts of HF's tracker (``sam3/model/memory.py``, ``sam3/sam/transformer.py``)."""

from __future__ import annotations

import numpy as np
import torch
from transformers import Sam3TrackerVideoModel

from .detection import Outputs, to_numpy


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array, np.float32))


@torch.no_grad()
def run_memory_encoder(
    tracker: Sam3TrackerVideoModel, features: np.ndarray, masks: np.ndarray
) -> Outputs:
    """Memory maps of objects.

    Args:
      tracker: from ``build``.
      features: (b, h, w, d) maps of the coarsest level.
      masks: (b, 16h, 16w) values as the network was trained on them (sigmoid x 20 - 10).

    Returns:
      ``memory`` (b, h, w, c) and ``position`` (b, h, w, c), its sine encoding.
    """
    maps = _tensor(features).movedim(-1, 1)
    memory, position = tracker.memory_encoder(maps, _tensor(masks)[:, None])
    return to_numpy({"memory": memory.movedim(1, -1), "position": position.movedim(1, -1)})


@torch.no_grad()
def run_memory_attention(
    tracker: Sam3TrackerVideoModel,
    features: np.ndarray,
    position: np.ndarray,
    memory: np.ndarray,
    memory_position: np.ndarray,
    pointers: int,
) -> np.ndarray:
    """A frame's map conditioned on memory.

    Args:
      tracker: from ``build``.
      features: (b, n, d) tokens of the map; ``position`` (b, n, d) their encoding.
      memory: (b, m, c) tokens, maps first; ``memory_position`` (b, m, c).
      pointers: how many of the last tokens are parts of object pointers, which do not rotate.

    Returns:
      (b, n, d).
    """
    first = (_tensor(a).transpose(0, 1) for a in (features, memory, position, memory_position))
    out = tracker.memory_attention(*first, num_object_pointer_tokens=pointers)
    return out.squeeze(1).numpy() if out.ndim == 4 else out.transpose(0, 1).numpy()


@torch.no_grad()
def run_object_pointer(
    tracker: Sam3TrackerVideoModel, tokens: np.ndarray, object_logits: np.ndarray
) -> np.ndarray:
    """Pointers (b, d) of mask tokens (b, d): the learned absence where a logit is not positive."""
    pointers = tracker.object_pointer_proj(_tensor(tokens))
    present = (_tensor(object_logits) > 0).float()[:, None]
    return (present * pointers + (1 - present) * tracker.no_object_pointer).numpy()

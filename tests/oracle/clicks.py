"""Runs HF's tracker as upstream's image predictor does (``model/sam1_task_predictor.py``)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from transformers import Sam3TrackerModel

from .detection import Outputs, encode_image, to_numpy


class ClickImage(NamedTuple):
    """What a click reads of one image: (1, c, h, w) maps, the coarsest with no-memory embedding."""

    high_resolution: list[torch.Tensor]
    coarse: torch.Tensor
    position: torch.Tensor


@torch.no_grad()
def encode_click_image(tracker: Sam3TrackerModel, pixels: np.ndarray) -> ClickImage:
    """Image features for several calls of :func:`run_click`. ``pixels``: (1, h, w, 3)."""
    if len(pixels) != 1:
        raise ValueError(f"run_click takes one image, got pixels of shape {pixels.shape}")
    fine, middle, coarse = encode_image(tracker, pixels).fpn_hidden_states[:3]
    return ClickImage(
        [tracker.mask_decoder.conv_s0(fine), tracker.mask_decoder.conv_s1(middle)],
        coarse + tracker.no_memory_embedding.view(1, -1, 1, 1),
        tracker.get_image_wide_positional_embeddings(),
    )


def _sparse(
    tracker: Sam3TrackerModel,
    points: np.ndarray | None,
    labels: np.ndarray | None,
    box: np.ndarray | None,
) -> torch.Tensor:
    """(1, 1, n, d): box corners, points and one padding point; nothing at all without either."""
    xy, marks = np.zeros((0, 2)), np.zeros(0, np.int64)
    if points is not None:
        xy, marks = np.asarray(points), np.asarray(labels)
    if box is not None:
        xy = np.concatenate([np.reshape(box, (2, 2)), xy])
        marks = np.concatenate([[2, 3], marks])
    if not len(xy):
        return torch.zeros(1, 1, 0, tracker.hidden_dim)
    return tracker.prompt_encoder._embed_points(
        torch.from_numpy(xy.astype(np.float32))[None, None],
        torch.from_numpy(marks.astype(np.int64))[None, None],
        pad=True,
    )


@torch.no_grad()
def run_click(
    tracker: Sam3TrackerModel,
    pixels: np.ndarray | ClickImage,
    points: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    box: np.ndarray | None = None,
    mask_input: np.ndarray | None = None,
    *,
    multimask: bool = True,
) -> Outputs:
    """One prompt on one image.

    Args:
      tracker: from ``build``.
      pixels: (1, h, w, 3) preprocessed, or :func:`encode_click_image` of it.
      points: (n, 2) pixels of the model's input frame, (x, y); ``labels`` (n,) 1 or 0.
      box: (4,) x0, y0, x1, y1 in the same pixels.
      mask_input: (h, w) logits at the finest level's side.
      multimask: whether three masks are returned as ``low_res_logits`` or one.

    Returns:
      All four hypotheses, the fields of ``sam3_jax.types.ClickOutput`` without the prompt axis:
      ``masks`` (4, h, w), ``iou`` (4,), ``object_logits`` (), ``tokens`` (4, d); and what the
      predictor hands out: ``selected_masks``, ``selected_iou`` (m of them, stability fallback
      applied) and ``low_res_logits``, the masks clamped to +-32.
    """
    image = encode_click_image(tracker, pixels) if isinstance(pixels, np.ndarray) else pixels
    if mask_input is None:
        dense = tracker.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1)
    else:
        logits = torch.from_numpy(np.asarray(mask_input, np.float32))
        dense = tracker.prompt_encoder.mask_embed(logits[None, None])
    decoder = tracker.mask_decoder

    def decode(multimask_output: bool, stability: bool) -> tuple[torch.Tensor, ...]:
        decoder.dynamic_multimask_via_stability = stability
        return decoder(
            image_embeddings=image.coarse,
            image_positional_embeddings=image.position,
            sparse_prompt_embeddings=_sparse(tracker, points, labels, box),
            dense_prompt_embeddings=dense,
            multimask_output=multimask_output,
            high_resolution_features=image.high_resolution,
        )

    single = decode(False, False)
    multiple = decode(True, True)
    selected = decode(multimask, True)
    masks, iou, tokens = (
        torch.cat([a, b], 2)[0, 0] for a, b in zip(single[:3], multiple[:3], strict=True)
    )
    return to_numpy(
        {
            "masks": masks,
            "iou": iou,
            "object_logits": single[3][0, 0, 0],
            "tokens": tokens,
            "selected_masks": selected[0][0, 0],
            "selected_iou": selected[1][0, 0],
            "low_res_logits": selected[0][0, 0].clamp(-32, 32),
        }
    )

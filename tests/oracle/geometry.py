"""HF's geometry encoder with the two things it lacks: prompts without boxes, and points.

Upstream (``model/geometry_encoders.py``) always gives the class token, HF none at all unless
there is a box; and HF left out the point branch, whose weights the release holds.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import Sam3Model
from transformers.models.sam3.modeling_sam3 import Sam3GeometryEncoder, concat_padded_sequences

from .weights import fill

Prompts = tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]


def add_point_prompts(model: Sam3Model, seed: int) -> Sam3Model:
    """Gives HF's geometry encoder upstream's three point projections, seeded; returns the model."""
    encoder = model.geometry_encoder
    dim = encoder.hidden_size
    for name, inputs in (
        ("points_direct_project", 2),
        ("points_pool_project", dim),
        ("points_pos_enc_project", dim),
    ):
        layer = torch.nn.Linear(inputs, dim)
        for part, tensor in layer.named_parameters():
            fill(tensor, f"{name}.{part}", f"geometry_encoder.{name}.{part}", seed)
        setattr(encoder, name, layer)
    return model


def _prepare(prompts: Prompts, count: int, width: int) -> tuple[torch.Tensor, ...]:
    """Coordinates (p, n, width), labels (p, n), mask (p, n) as tensors, empty if not given."""
    coordinates, labels, mask = prompts
    if coordinates is None:
        coordinates = np.zeros((count, 0, width), np.float32)
    if len(coordinates) != count:
        raise ValueError(f"geometry for {len(coordinates)} prompts, but text for {count}")
    shape = coordinates.shape[:2]
    labels = np.ones(shape, np.int64) if labels is None else np.asarray(labels, np.int64)
    mask = np.ones(shape, bool) if mask is None else np.asarray(mask, bool)
    return tuple(torch.from_numpy(a) for a in (np.asarray(coordinates, np.float32), labels, mask))


def _embed_points(
    encoder: Sam3GeometryEncoder, points: torch.Tensor, labels: torch.Tensor, image: torch.Tensor
) -> torch.Tensor:
    """(p, n, 2) -> (p, n, d); ``image`` (p, d, h, w) is normalised."""
    grid = (2 * points - 1)[:, :, None]
    sampled = torch.nn.functional.grid_sample(image, grid, align_corners=False)
    x, y = encoder.position_encoding.encode_1d_positions(*points.flatten(0, 1).unbind(-1))
    sine = torch.cat([x, y], -1).unflatten(0, points.shape[:2])  # x first, unlike boxes
    return (
        encoder.points_direct_project(points)
        + encoder.points_pool_project(sampled.squeeze(-1).transpose(1, 2))
        + encoder.points_pos_enc_project(sine)
        + encoder.label_embed(labels)
    )


def encode_geometry(
    encoder: Sam3GeometryEncoder,
    image: torch.Tensor,
    position: torch.Tensor,
    boxes: Prompts,
    points: Prompts,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Geometry tokens (p, n, d) and their mask (p, n) for image features (p, d, h, w)."""
    count = len(image)
    box, box_labels, box_mask = _prepare(boxes, count, 4)
    point, point_labels, point_mask = _prepare(points, count, 2)
    if not point.shape[1]:
        out = encoder(box, box_mask, box_labels, (image,), (position,))
        return out.last_hidden_state, out.attention_mask
    normalised = encoder.vision_layer_norm(image.movedim(1, -1)).movedim(-1, 1)
    point_tokens = _embed_points(encoder, point, point_labels, normalised)
    encode_boxes = encoder._encode_boxes

    def with_points(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return concat_padded_sequences(point_tokens, point_mask, *encode_boxes(*args))

    encoder._encode_boxes = with_points  # shadows the method until deleted
    try:
        out = encoder(box, box_mask, box_labels, (image,), (position,))
    finally:
        del encoder._encode_boxes
    return out.last_hidden_state, out.attention_mask

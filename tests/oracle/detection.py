"""Runs the HF detector as upstream's ``Sam3Image.forward_grounding`` would run it.

HF's own ``Sam3Model.forward`` differs in what it does between its parts (see the package's
docstring), so the parts are called one by one here. Everything goes in and comes out in this
project's conventions: channels last, boxes (cx, cy, w, h), True = valid, the names of
``sam3_jax.types``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from transformers import Sam3Model
from transformers.models.sam3 import modeling_sam3
from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput

from .geometry import encode_geometry

Outputs = dict[str, np.ndarray]


def to_torch(pixels: np.ndarray) -> torch.Tensor:
    """(b, h, w, 3) -> (b, 3, h, w)."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, 1)))


def to_numpy(outputs: dict[str, torch.Tensor]) -> Outputs:
    """Detaches every tensor."""
    return {name: value.detach().numpy() for name, value in outputs.items()}


def channels_last(feature_map: torch.Tensor) -> np.ndarray:
    """(b, c, h, w) -> (b, h, w, c)."""
    return np.moveaxis(feature_map.detach().numpy(), 1, -1)


@torch.no_grad()
def encode_image(model: torch.nn.Module, pixels: np.ndarray) -> Sam3VisionEncoderOutput:
    """Image features for several calls of :func:`run_detector`. ``pixels``: (b, h, w, 3)."""
    return model.vision_encoder(to_torch(pixels))


def run_vision(model: torch.nn.Module, pixels: np.ndarray) -> dict:
    """``trunk`` (b, h, w, c) and ``levels``, three maps (b, h, w, d), finest first.

    Takes a detector or a tracker: each has the same trunk and its own neck.
    """
    image = encode_image(model, pixels)
    grid = image.fpn_hidden_states[2].shape[-2:]
    trunk = image.last_hidden_state.unflatten(1, grid)
    return {
        "trunk": trunk.numpy(),
        "levels": tuple(channels_last(level) for level in image.fpn_hidden_states[:3]),
    }


def _encode_text(model: Sam3Model, token_ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.from_numpy(np.asarray(token_ids, np.int64))
    # Without a padding mask, as upstream: padding follows the text, so under the causal mask it
    # changes nothing but its own positions, and those nobody reads.
    hidden = model.text_encoder.text_model(input_ids=ids).last_hidden_state
    return model.text_projection(hidden), ids != 0


@torch.no_grad()
def run_text(model: Sam3Model, token_ids: np.ndarray) -> Outputs:
    """``tokens`` (t, n, d) and ``mask`` (t, n) of phrases given as (t, n) ids, 0 = padding."""
    tokens, mask = _encode_text(model, token_ids)
    return to_numpy({"tokens": tokens, "mask": mask})


class _FirstQueriesAttend(torch.nn.Module):
    """Self-attention among the first tokens only; the others receive nothing."""

    def __init__(self, attention: torch.nn.Module, count: int):
        super().__init__()
        self.attention, self.count = attention, count

    def forward(self, query, key, value, attention_mask=None, **unused):
        first = slice(0, self.count)
        out, weights = self.attention(query[:, first], key[:, first], value[:, first])
        return torch.nn.functional.pad(out, (0, 0, 0, query.shape[1] - self.count)), weights


class _Twice(torch.nn.Module):
    """An embedding table stacked on itself."""

    def __init__(self, table: torch.nn.Embedding):
        super().__init__()
        self.table = table

    @property
    def weight(self) -> torch.Tensor:
        return self.table.weight.repeat(2, 1)


@contextlib.contextmanager
def divide_and_conquer(model: Sam3Model) -> Iterator[None]:
    """The decoder with DAC, which HF lacks: queries and references doubled.

    Upstream (``model/decoder.py``) lets the second half, the one-to-many queries, skip
    self-attention but pass the norm behind it; the presence token attends with the first half.
    """
    decoder = model.detr_decoder
    queries, references = decoder.query_embed, decoder.reference_points
    attentions = [layer.self_attn for layer in decoder.layers]
    try:
        decoder.query_embed, decoder.reference_points = _Twice(queries), _Twice(references)
        for layer, attention in zip(decoder.layers, attentions, strict=True):
            layer.self_attn = _FirstQueriesAttend(attention, 1 + queries.num_embeddings)
        yield
    finally:
        decoder.query_embed, decoder.reference_points = queries, references
        for layer, attention in zip(decoder.layers, attentions, strict=True):
            layer.self_attn = attention


def ground(
    model: Sam3Model,
    image: Sam3VisionEncoderOutput,
    image_ids: torch.Tensor,
    prompt: torch.Tensor,
    prompt_mask: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Fusion, decoder, scoring and segmentation for prompts (p, n, d) with mask (p, n).

    Differentiable; the query axis is as long as the decoder's tables make it.
    """
    levels = [level[image_ids] for level in image.fpn_hidden_states[:3]]
    position = image.fpn_position_encoding[2][image_ids]
    memory = model.detr_encoder(
        vision_features=[levels[2]],
        text_features=prompt,
        vision_pos_embeds=[position],
        text_mask=prompt_mask,
    )
    decoder = model.detr_decoder
    decoded = decoder(
        vision_features=memory.last_hidden_state,
        text_features=prompt,
        vision_pos_encoding=memory.pos_embeds_flattened,
        text_mask=prompt_mask,
        spatial_shapes=memory.spatial_shapes,
    )
    queries = decoded.intermediate_hidden_states
    references = modeling_sam3.inverse_sigmoid(decoded.reference_boxes)
    masks = model.mask_decoder(
        decoder_queries=queries[-1],
        backbone_features=levels,
        encoder_hidden_states=memory.last_hidden_state,
        prompt_features=prompt,
        prompt_mask=prompt_mask,
    )
    return {
        "memory": memory.last_hidden_state,
        "layer_queries": queries,
        "layer_boxes": (references + decoder.box_head(queries)).sigmoid(),
        "layer_logits": model.dot_product_scoring(queries, prompt, prompt_mask).squeeze(-1),
        "layer_presence": decoded.presence_logits.squeeze(-1),
        "pred_masks": masks.pred_masks,
        "semantic_seg": masks.semantic_seg.squeeze(1),
    }


def detect(
    model: Sam3Model,
    pixels: np.ndarray | Sam3VisionEncoderOutput,
    token_ids: np.ndarray,
    boxes: np.ndarray | None = None,
    box_labels: np.ndarray | None = None,
    box_mask: np.ndarray | None = None,
    points: np.ndarray | None = None,
    point_labels: np.ndarray | None = None,
    point_mask: np.ndarray | None = None,
    image_ids: np.ndarray | None = None,
    *,
    dac: bool = False,
) -> dict[str, torch.Tensor]:
    """:func:`run_detector` before the conversion to numpy, differentiable."""
    image = pixels
    if isinstance(image, np.ndarray):
        image = model.vision_encoder(to_torch(image))
    count = len(token_ids)
    ids = torch.from_numpy(np.arange(count) if image_ids is None else np.asarray(image_ids))
    text, text_mask = _encode_text(model, token_ids)
    geometry, geometry_mask = encode_geometry(
        model.geometry_encoder,
        image.fpn_hidden_states[2][ids],
        image.fpn_position_encoding[2][ids],
        (boxes, box_labels, box_mask),
        (points, point_labels, point_mask),
    )
    prompt = torch.cat([text, geometry], 1)
    prompt_mask = torch.cat([text_mask, geometry_mask], 1)
    with divide_and_conquer(model) if dac else contextlib.nullcontext():
        out = ground(model, image, ids, prompt, prompt_mask)
    num_queries = model.detr_decoder.query_embed.num_embeddings
    return out | {
        "pred_logits": out["layer_logits"][-1, :, :num_queries],
        "pred_boxes": out["layer_boxes"][-1, :, :num_queries],
        "presence_logits": out["layer_presence"][-1],
        "text_tokens": text,
        "text_mask": text_mask,
        "geometry_tokens": geometry,
        "geometry_mask": geometry_mask,
    }


@torch.no_grad()
def run_detector(
    model: Sam3Model,
    pixels: np.ndarray | Sam3VisionEncoderOutput,
    token_ids: np.ndarray,
    boxes: np.ndarray | None = None,
    box_labels: np.ndarray | None = None,
    box_mask: np.ndarray | None = None,
    points: np.ndarray | None = None,
    point_labels: np.ndarray | None = None,
    point_mask: np.ndarray | None = None,
    image_ids: np.ndarray | None = None,
    *,
    dac: bool = False,
) -> Outputs:
    """All outputs of the detector for p prompts.

    Args:
      model: from ``build``; with points, after ``geometry.add_point_prompts``.
      pixels: (b, h, w, 3) preprocessed images, or :func:`encode_image` of them.
      token_ids: (p, n), 0 = padding.
      boxes: (p, nb, 4) fractions, (cx, cy, w, h); ``box_labels`` (p, nb) 1 or 0 (default 1);
        ``box_mask`` (p, nb) (default all valid), padding last.
      points: (p, np, 2) fractions, (x, y); labels and mask likewise.
      image_ids: (p,) which image each prompt is about; default prompt i, image i.
      dac: run the decoder with one-to-many copies of the queries, as in training.

    Returns:
      The fields of ``sam3_jax.types.GroundOutput`` plus ``layer_queries`` (l, p, qa, d) and
      ``text_tokens``, ``text_mask``, ``geometry_tokens``, ``geometry_mask`` of the prompt. The
      geometry tokens are compact as upstream's are: valid points, valid boxes, class token,
      padding (undefined values).
    """
    return to_numpy(
        detect(
            model,
            pixels,
            token_ids,
            boxes,
            box_labels,
            box_mask,
            points,
            point_labels,
            point_mask,
            image_ids,
            dac=dac,
        )
    )

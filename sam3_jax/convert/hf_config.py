"""``config.json`` of Hugging Face transformers <-> our :class:`ModelConfig`.

HF's file says sizes that tensors alone do not show (numbers of heads, windows, LayerNorm eps), so
it decides when it lies beside the weights; a folder that we write gets one.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from sam3_jax.config import ModelConfig
from sam3_jax.convert.errors import ConversionError

MODEL_TYPES = {
    "Sam3Model": "sam3",
    "Sam3TrackerModel": "sam3_tracker",
    "Sam3TrackerVideoModel": "sam3_tracker_video",
    "Sam3VideoModel": "sam3_video",
}

# Our field <- HF's key. One of ours may have several: all must agree with the tensors anyway.
_BACKBONE = {
    "hidden_size": "vision.dim",
    "intermediate_size": "vision.mlp_dim",
    "num_hidden_layers": "vision.depth",
    "num_attention_heads": "vision.num_heads",
    "patch_size": "vision.patch_size",
    "window_size": "vision.window_size",
    "global_attn_indexes": "vision.global_blocks",
    "layer_norm_eps": "vision.layer_norm_eps",
    "image_size": "image_size",
    "rope_parameters.rope_theta": "vision.rope_theta",
}
_VISION = {f"backbone_config.{key}": field for key, field in _BACKBONE.items()} | {
    "fpn_hidden_size": "dim"
}
_DETECTOR = {f"vision_config.{key}": field for key, field in _VISION.items()} | {
    "text_config.vocab_size": "text.vocab_size",
    "text_config.hidden_size": "text.dim",
    "text_config.intermediate_size": "text.mlp_dim",
    "text_config.num_hidden_layers": "text.depth",
    "text_config.num_attention_heads": "text.num_heads",
    "text_config.max_position_embeddings": "text.context_length",
    "text_config.layer_norm_eps": "text.layer_norm_eps",
    "geometry_encoder_config.hidden_size": "dim",
    "geometry_encoder_config.num_layers": "geometry.depth",
    "geometry_encoder_config.num_attention_heads": "geometry.num_heads",
    "geometry_encoder_config.intermediate_size": "geometry.mlp_dim",
    "geometry_encoder_config.roi_size": "geometry.roi_size",
    "detr_encoder_config.hidden_size": "dim",
    "detr_encoder_config.num_layers": "fusion.depth",
    "detr_encoder_config.num_attention_heads": "fusion.num_heads",
    "detr_encoder_config.intermediate_size": "fusion.mlp_dim",
    "detr_decoder_config.hidden_size": "dim",
    "detr_decoder_config.num_layers": "decoder.depth",
    "detr_decoder_config.num_attention_heads": "decoder.num_heads",
    "detr_decoder_config.intermediate_size": "decoder.mlp_dim",
    "detr_decoder_config.num_queries": "decoder.num_queries",
    "mask_decoder_config.hidden_size": "dim",
    "mask_decoder_config.num_attention_heads": "segmentation.num_heads",
}
_CLICKS = {f"vision_config.{key}": field for key, field in _VISION.items()} | {
    "prompt_encoder_config.hidden_size": "dim",
    "prompt_encoder_config.image_size": "image_size",
    "prompt_encoder_config.patch_size": "vision.patch_size",
    "prompt_encoder_config.mask_input_channels": "sam.mask_channels",
    "mask_decoder_config.hidden_size": "dim",
    "mask_decoder_config.iou_head_hidden_dim": "dim",
    "mask_decoder_config.mlp_dim": "sam.mlp_dim",
    "mask_decoder_config.num_hidden_layers": "sam.depth",
    "mask_decoder_config.num_attention_heads": "sam.num_heads",
    "mask_decoder_config.attention_downsample_rate": "sam.attention_downsample",
    "mask_decoder_config.num_multimask_outputs": "sam.num_multimask",
    "mask_decoder_config.dynamic_multimask_stability_delta": "sam.stability_delta",
    "mask_decoder_config.dynamic_multimask_stability_thresh": "sam.stability_threshold",
}
_TRACKER = _CLICKS | {
    "image_size": "image_size",
    "num_maskmem": "memory.num_maps",
    "memory_attention_hidden_size": "dim",
    "memory_attention_num_layers": "memory.attention_depth",
    "memory_attention_num_attention_heads": "memory.attention_heads",
    "memory_attention_feed_forward_hidden_size": "memory.mlp_dim",
    "memory_encoder_hidden_size": "dim",
    "memory_encoder_output_channels": "memory.dim",
    "mask_downsampler_embed_dim": "dim",
    "memory_fuser_num_layers": "memory.fuser_depth",
    "memory_fuser_embed_dim": "dim",
    "rope_parameters.rope_theta": "memory.rope_theta",
}
_KEYS = {
    "Sam3Model": _DETECTOR,
    "Sam3TrackerModel": _CLICKS,
    "Sam3TrackerVideoModel": _TRACKER,
    "Sam3VideoModel": {f"tracker_config.{key}": field for key, field in _TRACKER.items()}
    | {f"detector_config.{key}": field for key, field in _DETECTOR.items()},
}


def _get(data: Any, key: str) -> Any:
    for name in key.split("."):
        data = data.get(name) if isinstance(data, dict) else None
    return data


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    *folders, last = key.split(".")
    for name in folders:
        data = data.setdefault(name, {})
    data[last] = value


def _assign(config: ModelConfig, field: str, value: Any) -> None:
    """Sets a dotted field, with the type that it has. Raises TypeError or ValueError otherwise."""
    *owners, last = field.split(".")
    owner: Any = config
    for name in owners:
        owner = getattr(owner, name)
    old = getattr(owner, last)
    if isinstance(old, tuple):
        value = tuple(int(item) for item in value)
    elif isinstance(value, list) and len(set(value)) == 1:  # [1008, 1008]
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, tuple | int | float):
        raise TypeError(f"expected {type(old).__name__}, got {value!r}")
    setattr(owner, last, value if isinstance(old, tuple) else type(old)(value))


def read_hf_config(data: Any, base: ModelConfig, where: str) -> ModelConfig:
    """Our configuration with everything that an HF ``config.json`` says about a SAM 3 model.

    Args:
      data: the parsed file.
      base: what applies where the file is silent.
      where: the file, for errors.

    Raises:
      ConversionError: when the file is about another model or has a value of the wrong type.
    """
    model_type = data.get("model_type") if isinstance(data, dict) else None
    layout = {value: name for name, value in MODEL_TYPES.items()}.get(model_type)
    if layout is None:
        known = ", ".join(MODEL_TYPES.values())
        raise ConversionError(f"{where}: model_type {model_type!r} is not SAM 3's (one of {known})")
    config = copy.deepcopy(base)
    try:
        for key, field in _KEYS[layout].items():
            if (value := _get(data, key)) is not None:
                _assign(config, field, value)
        prefix = "detector_config." if layout == "Sam3VideoModel" else ""
        side = _get(data, f"{prefix}vision_config.backbone_config.pretrain_image_size")
        if side is not None:
            config.vision.pos_grid = int(side) // config.vision.patch_size
        if layout in ("Sam3Model", "Sam3VideoModel"):  # HF sizes the scoring MLP like this
            config.scoring.mlp_dim = config.decoder.mlp_dim
    except (TypeError, ValueError) as error:
        raise ConversionError(f"{where}: {error}") from error
    return config


def write_hf_config(config: ModelConfig, layout: str) -> dict[str, Any]:
    """``config.json`` with which transformers builds the class ``layout`` at our sizes."""
    data: dict[str, Any] = {
        "architectures": [layout],
        "model_type": MODEL_TYPES[layout],
        "dtype": "float32",
    }
    values = dataclasses.asdict(config)
    for key, field in _KEYS[layout].items():
        value = _get(values, field)
        _set(data, key, list(value) if isinstance(value, tuple) else value)
    grid = config.image_size // config.vision.patch_size
    for part in (data, data.get("detector_config"), data.get("tracker_config")):
        if part and "vision_config" in part:
            part["vision_config"]["model_type"] = "sam3_vision_model"
            part["vision_config"]["backbone_feature_sizes"] = [[k * grid] * 2 for k in (4, 2, 1)]
            backbone = part["vision_config"]["backbone_config"]
            backbone["model_type"] = "sam3_vit_model"
            backbone["pretrain_image_size"] = config.vision.pos_grid * config.vision.patch_size
            backbone["rope_parameters"]["rope_type"] = "axial"
        if part and "text_config" in part:
            part["text_config"] |= {"model_type": "clip_text_model", "hidden_act": "gelu"}
            part["text_config"]["projection_dim"] = 512
        if part and "num_maskmem" in part:
            part["memory_fuser_intermediate_dim"] = 4 * config.dim
            part["memory_attention_rope_feat_sizes"] = [grid, grid]
            part["rope_parameters"]["rope_type"] = "axial"
    return data

"""HF models at the tiny and the released size, with upstream's settings where HF's differ.

The weights come uninitialised (building stays quick at 860M parameters): call
``weights.randomize`` next.
"""

from __future__ import annotations

import types

import torch
from transformers import (
    Sam3Config,
    Sam3Model,
    Sam3TrackerConfig,
    Sam3TrackerModel,
    Sam3TrackerVideoConfig,
    Sam3TrackerVideoModel,
    Sam3VideoConfig,
    Sam3VideoModel,
)
from transformers.initialization import no_init_weights
from transformers.models.sam3 import modeling_sam3

from sam3_jax import config as jax_config

from .roi import roi_align

# HF reaches RoIAlign through this module global only.
modeling_sam3.torchvision = types.SimpleNamespace(ops=types.SimpleNamespace(roi_align=roi_align))


def _vision(c: jax_config.ModelConfig) -> dict:
    grid = c.image_size // c.vision.patch_size
    return {
        "backbone_config": {
            "model_type": "sam3_vit_model",
            "hidden_size": c.vision.dim,
            "intermediate_size": c.vision.mlp_dim,
            "num_hidden_layers": c.vision.depth,
            "num_attention_heads": c.vision.num_heads,
            "image_size": c.image_size,
            "patch_size": c.vision.patch_size,
            "layer_norm_eps": c.vision.layer_norm_eps,  # HF's own default is 1e-6
            "window_size": c.vision.window_size,
            "global_attn_indexes": list(c.vision.global_blocks),
            "pretrain_image_size": c.vision.pos_grid * c.vision.patch_size,
        },
        "fpn_hidden_size": c.dim,
        "backbone_feature_sizes": [[k * grid, k * grid] for k in (4, 2, 1)],
    }


def hf_config(c: jax_config.ModelConfig) -> Sam3Config:
    """HF's detector configuration for one of ours."""
    text = {
        "model_type": "clip_text_model",
        "vocab_size": c.text.vocab_size,
        "hidden_size": c.text.dim,
        "intermediate_size": c.text.mlp_dim,
        "projection_dim": 512,
        "num_hidden_layers": c.text.depth,
        "num_attention_heads": c.text.num_heads,
        "max_position_embeddings": c.text.context_length,
        "hidden_act": "gelu",
        "layer_norm_eps": c.text.layer_norm_eps,
    }

    def stack(part: jax_config.GeometryConfig | jax_config.FusionConfig) -> dict:
        return {
            "hidden_size": c.dim,
            "num_layers": part.depth,
            "num_attention_heads": part.num_heads,
            "intermediate_size": part.mlp_dim,
        }

    return Sam3Config(
        vision_config=_vision(c),
        text_config=text,
        geometry_encoder_config=stack(c.geometry) | {"roi_size": c.geometry.roi_size},
        detr_encoder_config=stack(c.fusion),
        # HF takes the width of the scoring MLP from the decoder's.
        detr_decoder_config=stack(c.decoder) | {"num_queries": c.decoder.num_queries},
        mask_decoder_config={
            "hidden_size": c.dim,
            "num_attention_heads": c.segmentation.num_heads,
        },
    )


def _sam_parts(c: jax_config.ModelConfig) -> dict:
    return {
        "vision_config": _vision(c) | {"model_type": "sam3_vision_model"},
        "prompt_encoder_config": {
            "hidden_size": c.dim,
            "image_size": c.image_size,
            "patch_size": c.vision.patch_size,
            "mask_input_channels": c.sam.mask_channels,
        },
        "mask_decoder_config": {
            "hidden_size": c.dim,
            "mlp_dim": c.sam.mlp_dim,
            "num_hidden_layers": c.sam.depth,
            "num_attention_heads": c.sam.num_heads,
            "attention_downsample_rate": c.sam.attention_downsample,
            "num_multimask_outputs": c.sam.num_multimask,
            "iou_head_hidden_dim": c.dim,
            "dynamic_multimask_stability_delta": c.sam.stability_delta,
            "dynamic_multimask_stability_thresh": c.sam.stability_threshold,
        },
    }


def hf_tracker_config(c: jax_config.ModelConfig) -> Sam3TrackerConfig:
    """HF's configuration of the interactive image head."""
    return Sam3TrackerConfig(**_sam_parts(c))


def hf_tracker_video_config(c: jax_config.ModelConfig) -> Sam3TrackerVideoConfig:
    """HF's configuration of the whole tracker, memory included."""
    m = c.memory
    grid = c.image_size // c.vision.patch_size
    return Sam3TrackerVideoConfig(
        **_sam_parts(c),
        image_size=c.image_size,
        num_maskmem=m.num_maps,
        memory_attention_hidden_size=c.dim,
        memory_attention_num_layers=m.attention_depth,
        memory_attention_num_attention_heads=m.attention_heads,
        memory_attention_feed_forward_hidden_size=m.mlp_dim,
        memory_attention_rope_feat_sizes=[grid, grid],
        memory_encoder_hidden_size=c.dim,
        memory_encoder_output_channels=m.dim,
        mask_downsampler_embed_dim=c.dim,
        memory_fuser_num_layers=m.fuser_depth,
        memory_fuser_embed_dim=c.dim,
        memory_fuser_intermediate_dim=4 * c.dim,
    )


def _build(model_class: type, config: object) -> torch.nn.Module:
    with no_init_weights():
        return model_class(config).eval().float()


def detector(c: jax_config.ModelConfig) -> Sam3Model:
    """HF's detector at the size of one of our configurations, weights unset."""
    model = _build(Sam3Model, hf_config(c))
    model.detr_decoder.clamp_presence_logit_max_val = float("inf")
    return model


def tracker(c: jax_config.ModelConfig) -> Sam3TrackerModel:
    """HF's interactive head with its backbone at our configuration's size, weights unset."""
    return _build(Sam3TrackerModel, hf_tracker_config(c))


def tracker_video(c: jax_config.ModelConfig) -> Sam3TrackerVideoModel:
    """HF's whole tracker with its backbone at our configuration's size, weights unset."""
    return _build(Sam3TrackerVideoModel, hf_tracker_video_config(c))


def video(c: jax_config.ModelConfig) -> Sam3VideoModel:
    """HF's concept tracking model (detector, tracker, both necks), weights unset."""
    config = Sam3VideoConfig(
        detector_config=hf_config(c).to_dict(),
        tracker_config=hf_tracker_video_config(c).to_dict(),
        low_res_mask_size=4 * c.image_size // c.vision.patch_size,
    )
    model = _build(Sam3VideoModel, config)
    model.detector_model.detr_decoder.clamp_presence_logit_max_val = float("inf")
    return model


def tiny_detector() -> Sam3Model:
    """:func:`detector` at ``sam3_jax.config.tiny()``."""
    return detector(jax_config.tiny())


def full_detector() -> Sam3Model:
    """:func:`detector` at the released size (3.4 GB)."""
    return detector(jax_config.sam3())


def tiny_tracker() -> Sam3TrackerModel:
    """:func:`tracker` at ``sam3_jax.config.tiny()``."""
    return tracker(jax_config.tiny())


def full_tracker() -> Sam3TrackerModel:
    """:func:`tracker` at the released size (1.8 GB)."""
    return tracker(jax_config.sam3())


def tiny_tracker_video() -> Sam3TrackerVideoModel:
    """:func:`tracker_video` at ``sam3_jax.config.tiny()``."""
    return tracker_video(jax_config.tiny())


def full_tracker_video() -> Sam3TrackerVideoModel:
    """:func:`tracker_video` at the released size (1.9 GB)."""
    return tracker_video(jax_config.sam3())


def tiny_video() -> Sam3VideoModel:
    """:func:`video` at ``sam3_jax.config.tiny()``."""
    return video(jax_config.tiny())


def full_video() -> Sam3VideoModel:
    """:func:`video` at the released size (3.4 GB)."""
    return video(jax_config.sam3())

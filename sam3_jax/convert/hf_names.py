"""Names of the tensors in the safetensors files of Hugging Face transformers.

Four classes save SAM 3: ``Sam3VideoModel`` (all of it, the file of the hub), ``Sam3Model`` (the
detector), ``Sam3TrackerVideoModel`` (the tracker) and ``Sam3TrackerModel`` (the tracker without
its memory). Their tensors are those of ``sam3.pt`` under other names, with q, k and v apart. So
the rows of the one table are rewritten here into rows whose source is HF's name; targets and kinds
stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from sam3_jax.config import ModelConfig
from sam3_jax.convert.rows import Row
from sam3_jax.convert.table import build_table, unused_names

_MLP3 = ((r"layers\.0\.", "proj_in."), (r"layers\.2\.", "proj_out."), (r"layers\.1\.", "layers.0."))
_ATTENTION = ((r"\.in_proj_(weight|bias)", r".qkv.\1"), (r"\.out_proj\.", ".o_proj."))
_NUMBERED = tuple((rf"\.layers\.{i}\.", f".layer{i + 1}.") for i in range(3))
_LAYER = (
    (r"\.linear(\d)\.", r".mlp.fc\1."),
    (r"\.cross_attn_image\.", ".cross_attn."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    *_ATTENTION,
)

# Prefix in sam3.pt -> prefix in Sam3VideoModel, and substitutions in what follows it, in order.
# The first prefix that fits a name decides.
_RULES: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    (
        "detector.backbone.vision_backbone.trunk.",
        "detector_model.vision_encoder.backbone.",
        (
            (r"^pos_embed$", "embeddings.position_embeddings"),
            (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
            (r"^ln_pre\.", "layer_norm."),
            (r"^blocks\.", "layers."),
            (r"\.norm(\d)\.", r".layer_norm\1."),
            (r"\.attn\.proj\.", ".attention.o_proj."),
            (r"\.attn\.", ".attention."),
        ),
    ),
    *(
        (
            f"detector.backbone.vision_backbone.{convs}.",
            f"{neck}.fpn_layers.",
            (
                (r"dconv_2x2(_0)?\.", "scale_layers.0."),
                (r"dconv_2x2_1\.", "scale_layers.2."),
                (r"conv_1x1\.", "proj1."),
                (r"conv_3x3\.", "proj2."),
            ),
        )
        for convs, neck in (
            ("convs", "detector_model.vision_encoder.neck"),
            ("sam2_convs", "tracker_neck"),
        )
    ),
    (
        "detector.backbone.language_backbone.encoder.",
        "detector_model.text_encoder.",
        (
            (r"^text_projection$", "text_projection.weight"),
            (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
            (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
            (r"^ln_final\.", "text_model.final_layer_norm."),
            (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
            (r"\.ln_(\d)\.", r".layer_norm\1."),
            (r"\.attn\.", ".self_attn."),
            (r"\.in_proj_(weight|bias)", r".qkv.\1"),
            (r"\.c_fc\.", ".fc1."),
            (r"\.c_proj\.", ".fc2."),
        ),
    ),
    ("detector.backbone.language_backbone.resizer.", "detector_model.text_projection.", ()),
    (
        "detector.geometry_encoder.",
        "detector_model.geometry_encoder.",
        (
            (r"^norm\.", "prompt_layer_norm."),
            (r"^img_pre_norm\.", "vision_layer_norm."),
            (r"^encode_norm\.", "output_layer_norm."),
            (r"^encode\.", "layers."),
            *_LAYER,
        ),
    ),
    ("detector.transformer.encoder.", "detector_model.detr_encoder.", _LAYER),
    (
        "detector.transformer.decoder.layers.",
        "detector_model.detr_decoder.layers.",
        (
            (r"\.norm1\.", ".vision_cross_attn_layer_norm."),
            (r"\.norm2\.", ".self_attn_layer_norm."),
            (r"\.norm3\.", ".mlp_layer_norm."),
            (r"\.catext_norm\.", ".text_cross_attn_layer_norm."),
            (r"\.linear(\d)\.", r".mlp.fc\1."),
            (r"\.cross_attn\.", ".vision_cross_attn."),
            (r"\.ca_text\.", ".text_cross_attn."),
            *_ATTENTION,
        ),
    ),
    (
        "detector.transformer.decoder.",
        "detector_model.detr_decoder.",
        (
            (r"^norm\.", "output_layer_norm."),
            (r"^bbox_embed\.", "box_head."),
            (r"^boxRPB_embed_", "box_rpb_embed_"),
            (r"^presence_token_head\.", "presence_head."),
            (r"^presence_token_out_norm\.", "presence_layer_norm."),
            *_NUMBERED,
        ),
    ),
    (
        "detector.segmentation_head.",
        "detector_model.mask_decoder.",
        (
            (r"^mask_predictor\.mask_embed\.", "mask_embedder."),
            (r"^cross_attend_prompt\.", "prompt_cross_attn."),
            (r"^cross_attn_norm\.", "prompt_cross_attn_norm."),
            (r"^semantic_seg_head\.", "semantic_projection."),
            (r"^instance_seg_head\.", "instance_projection."),
            *_ATTENTION,
        ),
    ),
    (
        "detector.dot_prod_scoring.",
        "detector_model.dot_product_scoring.",
        (
            (r"^prompt_mlp\.out_norm\.", "text_mlp_out_norm."),
            (r"^prompt_mlp\.", "text_mlp."),
            (r"^prompt_proj\.", "text_proj."),
            (r"^hs_proj\.", "query_proj."),
            *_NUMBERED,
        ),
    ),
    (
        "tracker.transformer.encoder.",
        "tracker_model.memory_attention.",
        (
            (r"^norm\.", "layer_norm."),
            (r"\.norm(\d)\.", r".layer_norm\1."),
            (r"\.out_proj\.", ".o_proj."),
        ),
    ),
    (
        "tracker.maskmem_backbone.",
        "tracker_model.memory_encoder.",
        (
            *(
                (
                    rf"^mask_downsampler\.encoder\.{3 * i + j}\.",
                    f"mask_downsampler.layers.{i}.{to}.",
                )
                for i in range(4)
                for j, to in enumerate(("conv", "layer_norm"))
            ),
            (r"^mask_downsampler\.encoder\.12\.", "mask_downsampler.final_conv."),
            (r"^pix_feat_proj\.", "feature_projection."),
            (r"^out_proj\.", "projection."),
            (r"^fuser\.", "memory_fuser."),
            (r"\.gamma$", ".scale"),
            (r"\.dwconv\.", ".depthwise_conv."),
            (r"\.pwconv(\d)\.", r".pointwise_conv\1."),
            (r"\.norm\.", ".layer_norm."),
        ),
    ),
    (
        "tracker.sam_prompt_encoder.",
        "tracker_model.prompt_encoder.",
        (
            (
                r"^pe_layer\.positional_encoding_gaussian_matrix$",
                "shared_embedding.positional_embedding",
            ),
            (r"^point_embeddings\.\d\.", "point_embed."),
            (r"^mask_downscaling\.0\.", "mask_embed.conv1."),
            (r"^mask_downscaling\.1\.", "mask_embed.layer_norm1."),
            (r"^mask_downscaling\.3\.", "mask_embed.conv2."),
            (r"^mask_downscaling\.4\.", "mask_embed.layer_norm2."),
            (r"^mask_downscaling\.6\.", "mask_embed.conv3."),
        ),
    ),
    (
        "tracker.sam_mask_decoder.transformer.",
        "tracker_model.mask_decoder.transformer.",
        (
            (r"\.norm(\d)\.", r".layer_norm\1."),
            (r"^norm_final_attn\.", "layer_norm_final_attn."),
            (r"\.lin1\.", ".proj_in."),
            (r"\.lin2\.", ".proj_out."),
            (r"\.out_proj\.", ".o_proj."),
        ),
    ),
    (
        "tracker.sam_mask_decoder.",
        "tracker_model.mask_decoder.",
        (
            (r"^output_upscaling\.0\.", "upscale_conv1."),
            (r"^output_upscaling\.1\.", "upscale_layer_norm."),
            (r"^output_upscaling\.3\.", "upscale_conv2."),
            *_MLP3,
        ),
    ),
    (
        "tracker.",
        "tracker_model.",
        (
            (r"^maskmem_tpos_enc$", "memory_temporal_positional_encoding"),
            (r"^no_mem_embed$", "no_memory_embedding"),
            (r"^no_mem_pos_enc$", "no_memory_positional_encoding"),
            (r"^no_obj_ptr$", "no_object_pointer"),
            (r"^no_obj_embed_spatial$", "occlusion_spatial_embedding_parameter"),
            (r"^obj_ptr_proj\.", "object_pointer_proj."),
            (r"^obj_ptr_tpos_proj\.", "temporal_positional_encoding_projection_layer."),
            *_MLP3,
        ),
    ),
)

# Tensors that HF's classes do not have: point prompts of the detector, RoPE tables.
_NOT_IN_HF = re.compile(r"geometry_encoder\.points_|\.freqs_cis$")
GAUSSIAN = "tracker_model.prompt_encoder.shared_embedding.positional_embedding"
GAUSSIAN_COPY = "tracker_model.shared_image_embedding.positional_embedding"


class Unused(NamedTuple):
    """A tensor that no parameter is made from: its name in the source, and that of ``sam3.pt``."""

    source: str
    stored: str
    transposed: bool = False


def video_name(name: str) -> str | None:
    """Name in ``Sam3VideoModel`` of a tensor of ``sam3.pt``; None where HF has none.

    A matrix that HF splits keeps ``qkv`` where HF says ``q_proj``, ``k_proj`` and ``v_proj``.
    """
    if _NOT_IN_HF.search(name):
        return None
    prefix, hf_prefix, substitutions = next(rule for rule in _RULES if name.startswith(rule[0]))
    rest = name[len(prefix) :]
    for pattern, to in substitutions:
        rest = re.sub(pattern, to, rest)
    return hf_prefix + rest


def _rewrite(row: Row) -> Iterator[Row]:
    """The rows that make the same parameters from HF's tensors."""
    name = video_name(row.source)
    if name is None:
        return
    if len(row.targets) == 3:
        for part, target in zip("qkv", row.targets, strict=True):
            yield Row(name.replace(".qkv.", f".{part}_proj."), (target,), row.kind, row.ones)
    elif row.targets[0].endswith("[0]"):  # four tables of one row: one table in HF
        yield Row(name, (row.targets[0].removesuffix("[0]"),), row.kind, row.ones)
    elif not row.targets[0].endswith("]"):
        yield Row(name, row.targets, row.kind, row.ones)


def hf_rows(config: ModelConfig) -> list[Row]:
    """The table in the names of ``Sam3VideoModel``."""
    return [new for row in build_table(config) for new in _rewrite(row)]


def hf_unused(config: ModelConfig) -> list[Unused]:
    """Unused tensors that HF keeps, in the names of ``Sam3VideoModel``."""
    names = {name: video_name(name) for name in unused_names(config)}
    return [
        Unused(name, stored, transposed=stored.endswith(".text_projection"))
        for stored, name in names.items()
        if name is not None
    ]


def normal_name(name: str) -> str:
    """Removes the ``tracker_model.`` that transformers 5 puts before every name when saving a
    tracker class (the inverse of the renaming that it loads with)."""
    return re.sub(r"^tracker_model\.(?=(?:detector_model|tracker_model|tracker_neck)\.)", "", name)


def tracker_name(name: str) -> str:
    """A name of ``Sam3VideoModel`` as the tracker classes have it."""
    name = re.sub(r"^detector_model\.(?=vision_encoder\.backbone\.)", "", name)
    return re.sub(r"^tracker_neck\.", "vision_encoder.neck.", name).removeprefix("tracker_model.")


def detector_name(name: str) -> str:
    """A name of ``Sam3VideoModel`` as ``Sam3Model`` has it."""
    return name.removeprefix("detector_model.")


def is_multiplex(names: Iterable[str]) -> bool:
    """Whether the names are those of SAM 3.1, whose tracker is another model.

    Its tracker lies under ``tracker.model.`` and has an interactive and a propagation path
    (upstream ``sam3/model/video_tracking_multiplex.py``).
    """
    tell_tale = re.compile(
        r"(^|\.)tracker\.model\.|multiplex|(^|\.)(interactive|propagation)_(convs|sam_|obj_ptr|mask)"
        r"|(^|\.)interactivity_no_mem_embed"
    )
    return any(tell_tale.search(name) for name in names)

"""Which tensors of transformers' SAM 3 classes are which tensors of the released ``sam3.pt``.

One list of rules, read in both directions by ``hf_layouts.py``. The components are written once; a
layout (one of the four classes, ``transformers/models/sam3*/modeling_*.py``) says under which
prefixes they lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from sam3_jax.config import ModelConfig
from sam3_jax.convert.table import POS_EMBED

Layout = Literal["Sam3Model", "Sam3TrackerModel", "Sam3TrackerVideoModel", "Sam3VideoModel"]


class Rule(NamedTuple):
    """Tensors of ``sam3.pt`` and the tensors of a transformers class that hold the same numbers.

    Operations, read from transformers to ``sam3.pt``: ``copy``; ``concat`` (several make one,
    along the first axis); ``split`` (one makes several, along the first axis); ``transpose``;
    ``copies`` (several that must agree make one); ``positions`` (``copy``, but ``sam3.pt`` may
    have one more row in front, for a class token that nobody reads).
    """

    upstream: tuple[str, ...]
    hf: tuple[str, ...]
    op: str = "copy"


def _one(upstream: str, hf: str, op: str = "copy") -> Iterator[Rule]:
    yield Rule((upstream,), (hf,), op)


def _affine(upstream: str, hf: str) -> Iterator[Rule]:
    for part in ("weight", "bias"):
        yield from _one(f"{upstream}.{part}", f"{hf}.{part}")


def _affines(upstream: str, hf: str, names: Mapping[str, str]) -> Iterator[Rule]:
    for theirs, hfs in names.items():
        yield from _affine(f"{upstream}.{theirs}", f"{hf}.{hfs}")


def _fused_attention(
    upstream: str,
    hf: str,
    fused: str = "in_proj_",
    out: tuple[str, str] = ("out_proj", "o_proj"),
) -> Iterator[Rule]:
    """q, k and v are one matrix in ``sam3.pt``."""
    for part in ("weight", "bias"):
        parts = tuple(f"{hf}.{p}_proj.{part}" for p in "qkv")
        yield Rule((f"{upstream}.{fused}{part}",), parts, "concat")
    yield from _affine(f"{upstream}.{out[0]}", f"{hf}.{out[1]}")


def _sam_attention(upstream: str, hf: str) -> Iterator[Rule]:
    names = {f"{p}_proj": f"{p}_proj" for p in "qkv"} | {"out_proj": "o_proj"}
    yield from _affines(upstream, hf, names)


def _head(upstream: str, hf: str, depth: int) -> Iterator[Rule]:
    """An MLP of the detector: HF counts its layers from one."""
    names = {f"layers.{i}": f"layer{i + 1}" for i in range(depth)}
    yield from _affines(upstream, hf, names)


def _sam_head(upstream: str, hf: str) -> Iterator[Rule]:
    """An MLP of three layers of the tracker."""
    names = {"layers.0": "proj_in", "layers.1": "layers.0", "layers.2": "proj_out"}
    yield from _affines(upstream, hf, names)


def _trunk(config: ModelConfig, hf: str) -> Iterator[Rule]:
    upstream = "detector.backbone.vision_backbone.trunk"
    patches = f"{hf}.embeddings.patch_embeddings.projection.weight"
    yield from _one(f"{upstream}.patch_embed.proj.weight", patches)
    yield from _one(POS_EMBED, f"{hf}.embeddings.position_embeddings", "positions")
    yield from _affine(f"{upstream}.ln_pre", f"{hf}.layer_norm")
    names = {
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for i in range(config.vision.depth):
        u, h = f"{upstream}.blocks.{i}", f"{hf}.layers.{i}"
        yield from _fused_attention(f"{u}.attn", f"{h}.attention", "qkv.", ("proj", "o_proj"))
        yield from _affines(u, h, names)


def _neck(convs: str, hf: str) -> Iterator[Rule]:
    names = {
        "0.dconv_2x2_0": "0.scale_layers.0",
        "0.dconv_2x2_1": "0.scale_layers.2",
        "1.dconv_2x2": "1.scale_layers.0",
    }
    for i in range(4):
        names |= {f"{i}.conv_1x1": f"{i}.proj1", f"{i}.conv_3x3": f"{i}.proj2"}
    yield from _affines(f"detector.backbone.vision_backbone.{convs}", f"{hf}.fpn_layers", names)


def _text(config: ModelConfig, hf: str) -> Iterator[Rule]:
    upstream = "detector.backbone.language_backbone"
    encoder, model = f"{upstream}.encoder", f"{hf}text_encoder.text_model"
    embeddings = f"{model}.embeddings"
    yield from _one(f"{encoder}.positional_embedding", f"{embeddings}.position_embedding.weight")
    yield from _one(f"{encoder}.token_embedding.weight", f"{embeddings}.token_embedding.weight")
    names = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for i in range(config.text.depth):
        u, h = f"{encoder}.transformer.resblocks.{i}", f"{model}.encoder.layers.{i}"
        yield from _fused_attention(f"{u}.attn", f"{h}.self_attn", out=("out_proj", "out_proj"))
        yield from _affines(u, h, names)
    yield from _affine(f"{encoder}.ln_final", f"{model}.final_layer_norm")
    projection = f"{hf}text_encoder.text_projection.weight"
    yield from _one(f"{encoder}.text_projection", projection, "transpose")
    yield from _affine(f"{upstream}.resizer", f"{hf}text_projection")


def _cross_attention_layer(upstream: str, hf: str) -> Iterator[Rule]:
    yield from _fused_attention(f"{upstream}.self_attn", f"{hf}.self_attn")
    yield from _fused_attention(f"{upstream}.cross_attn_image", f"{hf}.cross_attn")
    names = {"linear1": "mlp.fc1", "linear2": "mlp.fc2"}
    yield from _affines(upstream, hf, names | {f"norm{j}": f"layer_norm{j}" for j in (1, 2, 3)})


def _geometry(config: ModelConfig, hf: str) -> Iterator[Rule]:
    upstream, hf = "detector.geometry_encoder", f"{hf}geometry_encoder"
    for name in ("label_embed", "cls_embed"):
        yield from _one(f"{upstream}.{name}.weight", f"{hf}.{name}.weight")
    for name in ("boxes_direct_project", "boxes_pool_project", "boxes_pos_enc_project"):
        yield from _affine(f"{upstream}.{name}", f"{hf}.{name}")
    names = {
        "final_proj": "final_proj",
        "norm": "prompt_layer_norm",
        "img_pre_norm": "vision_layer_norm",
        "encode_norm": "output_layer_norm",
    }
    yield from _affines(upstream, hf, names)
    for i in range(config.geometry.depth):
        yield from _cross_attention_layer(f"{upstream}.encode.{i}", f"{hf}.layers.{i}")


def _decoder(config: ModelConfig, hf: str) -> Iterator[Rule]:
    upstream, hf = "detector.transformer.decoder", f"{hf}detr_decoder"
    attentions = {
        "cross_attn": "vision_cross_attn",
        "ca_text": "text_cross_attn",
        "self_attn": "self_attn",
    }
    names = {
        "norm1": "vision_cross_attn_layer_norm",
        "catext_norm": "text_cross_attn_layer_norm",
        "norm2": "self_attn_layer_norm",
        "norm3": "mlp_layer_norm",
        "linear1": "mlp.fc1",
        "linear2": "mlp.fc2",
    }
    for i in range(config.decoder.depth):
        u, h = f"{upstream}.layers.{i}", f"{hf}.layers.{i}"
        for theirs, hfs in attentions.items():
            yield from _fused_attention(f"{u}.{theirs}", f"{h}.{hfs}")
        yield from _affines(u, h, names)
    for name in ("query_embed", "reference_points", "presence_token"):
        yield from _one(f"{upstream}.{name}.weight", f"{hf}.{name}.weight")
    yield from _affine(f"{upstream}.norm", f"{hf}.output_layer_norm")
    yield from _affine(f"{upstream}.presence_token_out_norm", f"{hf}.presence_layer_norm")
    yield from _head(f"{upstream}.presence_token_head", f"{hf}.presence_head", 3)
    yield from _head(f"{upstream}.bbox_embed", f"{hf}.box_head", 3)
    yield from _head(f"{upstream}.ref_point_head", f"{hf}.ref_point_head", 2)
    for axis in "xy":
        yield from _head(f"{upstream}.boxRPB_embed_{axis}", f"{hf}.box_rpb_embed_{axis}", 2)


def _segmentation(hf: str) -> Iterator[Rule]:
    upstream, hf = "detector.segmentation_head", f"{hf}mask_decoder"
    names = {
        "cross_attn_norm": "prompt_cross_attn_norm",
        "semantic_seg_head": "semantic_projection",
        "instance_seg_head": "instance_projection",
    }
    for i in range(3):
        names[f"mask_predictor.mask_embed.layers.{i}"] = f"mask_embedder.layers.{i}"
        for part in ("conv_layers", "norms"):
            names[f"pixel_decoder.{part}.{i}"] = f"pixel_decoder.{part}.{i}"
    yield from _affines(upstream, hf, names)
    yield from _fused_attention(f"{upstream}.cross_attend_prompt", f"{hf}.prompt_cross_attn")


def _scoring(hf: str) -> Iterator[Rule]:
    names = {
        "prompt_mlp.layers.0": "text_mlp.layer1",
        "prompt_mlp.layers.1": "text_mlp.layer2",
        "prompt_mlp.out_norm": "text_mlp_out_norm",
        "prompt_proj": "text_proj",
        "hs_proj": "query_proj",
    }
    yield from _affines("detector.dot_prod_scoring", f"{hf}dot_product_scoring", names)


def _detector(config: ModelConfig, hf: str) -> Iterator[Rule]:
    """All of ``Sam3Model`` but its vision encoder."""
    yield from _text(config, hf)
    yield from _geometry(config, hf)
    for i in range(config.fusion.depth):
        upstream = f"detector.transformer.encoder.layers.{i}"
        yield from _cross_attention_layer(upstream, f"{hf}detr_encoder.layers.{i}")
    yield from _decoder(config, hf)
    yield from _segmentation(hf)
    yield from _scoring(hf)


def _prompt_encoder(hf: str) -> Iterator[Rule]:
    upstream, encoder = "tracker.sam_prompt_encoder", f"{hf}prompt_encoder"
    matrix = "positional_embedding"
    matrices = (f"{encoder}.shared_embedding.{matrix}", f"{hf}shared_image_embedding.{matrix}")
    gaussian = f"{upstream}.pe_layer.positional_encoding_gaussian_matrix"
    yield Rule((gaussian,), matrices, "copies")
    points = tuple(f"{upstream}.point_embeddings.{i}.weight" for i in range(4))
    yield Rule(points, (f"{encoder}.point_embed.weight",), "split")
    for name in ("not_a_point_embed", "no_mask_embed"):
        yield from _one(f"{upstream}.{name}.weight", f"{encoder}.{name}.weight")
    modules = {0: "conv1", 1: "layer_norm1", 3: "conv2", 4: "layer_norm2", 6: "conv3"}
    names = {f"mask_downscaling.{i}": f"mask_embed.{name}" for i, name in modules.items()}
    yield from _affines(upstream, encoder, names)


def _mask_decoder(config: ModelConfig, hf: str) -> Iterator[Rule]:
    upstream, hf = "tracker.sam_mask_decoder", f"{hf}mask_decoder"
    transformer = {f"norm{j}": f"layer_norm{j}" for j in (1, 2, 3, 4)}
    transformer |= {"mlp.lin1": "mlp.proj_in", "mlp.lin2": "mlp.proj_out"}
    for i in range(config.sam.depth):
        layer = f"transformer.layers.{i}"
        u, h = f"{upstream}.{layer}", f"{hf}.{layer}"
        for name in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token"):
            yield from _sam_attention(f"{u}.{name}", f"{h}.{name}")
        yield from _affines(u, h, transformer)
    final = "transformer.final_attn_token_to_image"
    yield from _sam_attention(f"{upstream}.{final}", f"{hf}.{final}")
    names = {
        "transformer.norm_final_attn": "transformer.layer_norm_final_attn",
        "output_upscaling.0": "upscale_conv1",
        "output_upscaling.1": "upscale_layer_norm",
        "output_upscaling.3": "upscale_conv2",
        "conv_s0": "conv_s0",
        "conv_s1": "conv_s1",
    }
    yield from _affines(upstream, hf, names)
    for name in ("iou_token", "mask_tokens", "obj_score_token"):
        yield from _one(f"{upstream}.{name}.weight", f"{hf}.{name}.weight")
    heads = [f"output_hypernetworks_mlps.{i}" for i in range(1 + config.sam.num_multimask)]
    for name in (*heads, "iou_prediction_head", "pred_obj_score_head"):
        yield from _sam_head(f"{upstream}.{name}", f"{hf}.{name}")


def _click_head(config: ModelConfig, hf: str) -> Iterator[Rule]:
    """All of ``Sam3TrackerModel`` but its vision encoder."""
    yield from _one("tracker.no_mem_embed", f"{hf}no_memory_embedding")
    yield from _prompt_encoder(hf)
    yield from _mask_decoder(config, hf)


def _memory_attention(config: ModelConfig, hf: str) -> Iterator[Rule]:
    upstream, hf = "tracker.transformer.encoder", f"{hf}memory_attention"
    yield from _affine(f"{upstream}.norm", f"{hf}.layer_norm")
    names = {f"norm{j}": f"layer_norm{j}" for j in (1, 2, 3)}
    names |= {"linear1": "linear1", "linear2": "linear2"}
    for i in range(config.memory.attention_depth):
        u, h = f"{upstream}.layers.{i}", f"{hf}.layers.{i}"
        for name in ("self_attn", "cross_attn_image"):
            yield from _sam_attention(f"{u}.{name}", f"{h}.{name}")
        yield from _affines(u, h, names)


def _memory_encoder(config: ModelConfig, hf: str) -> Iterator[Rule]:
    upstream, hf = "tracker.maskmem_backbone", f"{hf}memory_encoder"
    names = {
        "mask_downsampler.encoder.12": "mask_downsampler.final_conv",
        "pix_feat_proj": "feature_projection",
        "out_proj": "projection",
    }
    for i in range(4):
        down = f"mask_downsampler.layers.{i}"
        names[f"mask_downsampler.encoder.{3 * i}"] = f"{down}.conv"
        names[f"mask_downsampler.encoder.{3 * i + 1}"] = f"{down}.layer_norm"
    for i in range(config.memory.fuser_depth):
        u, h = f"fuser.layers.{i}", f"memory_fuser.layers.{i}"
        yield from _one(f"{upstream}.{u}.gamma", f"{hf}.{h}.scale")
        names |= {f"{u}.dwconv": f"{h}.depthwise_conv", f"{u}.norm": f"{h}.layer_norm"}
        names |= {f"{u}.pwconv{j}": f"{h}.pointwise_conv{j}" for j in (1, 2)}
    yield from _affines(upstream, hf, names)


def _memory(config: ModelConfig, hf: str) -> Iterator[Rule]:
    """What ``Sam3TrackerVideoModel`` has beyond ``Sam3TrackerModel``."""
    for theirs, hfs in {
        "maskmem_tpos_enc": "memory_temporal_positional_encoding",
        "no_mem_pos_enc": "no_memory_positional_encoding",
        "no_obj_ptr": "no_object_pointer",
        "no_obj_embed_spatial": "occlusion_spatial_embedding_parameter",
    }.items():
        yield from _one(f"tracker.{theirs}", f"{hf}{hfs}")
    yield from _affine("tracker.mask_downsample", f"{hf}mask_downsample")
    yield from _sam_head("tracker.obj_ptr_proj", f"{hf}object_pointer_proj")
    pointer_time = f"{hf}temporal_positional_encoding_projection_layer"
    yield from _affine("tracker.obj_ptr_tpos_proj", pointer_time)
    yield from _memory_attention(config, hf)
    yield from _memory_encoder(config, hf)


def build_rules(layout: Layout, config: ModelConfig) -> list[Rule]:
    """All rules of a layout. Together they name every tensor of its ``state_dict`` once."""
    if layout == "Sam3VideoModel":
        detector, tracker, neck = "detector_model.", "tracker_model.", "tracker_neck"
    else:
        detector, tracker, neck = "", "", "vision_encoder.neck"
    rules = list(_trunk(config, f"{detector}vision_encoder.backbone"))
    if layout in ("Sam3Model", "Sam3VideoModel"):
        rules += _neck("convs", f"{detector}vision_encoder.neck")
        rules += _detector(config, detector)
    if layout != "Sam3Model":
        rules += _neck("sam2_convs", neck)
        rules += _click_head(config, tracker)
    if layout in ("Sam3TrackerVideoModel", "Sam3VideoModel"):
        rules += _memory(config, tracker)
    return rules

"""The one table between the released checkpoint's tensors and our parameters.

Every row says which tensor of ``sam3.pt`` (its name without container prefix) makes which of our
parameters; ``rows.py`` knows how. Row counts follow the configuration: the released size gives 1465
tensors with the unused ones.
"""

from __future__ import annotations

from collections.abc import Iterator

from sam3_jax.config import ModelConfig
from sam3_jax.convert.rows import POS_EMBED_PARAM, Row

POS_EMBED = "detector.backbone.vision_backbone.trunk.pos_embed"
CLASS_ROW = POS_EMBED + "[:, :1]"  # name under which its unused first row is kept


def _affine(source: str, target: str, kind: str = "linear") -> Iterator[Row]:
    yield Row(f"{source}.weight", (f"{target}/kernel",), kind)
    yield Row(f"{source}.bias", (f"{target}/bias",), "copy")


def _norm(source: str, target: str) -> Iterator[Row]:
    yield Row(f"{source}.weight", (f"{target}/scale",), "copy")
    yield Row(f"{source}.bias", (f"{target}/bias",), "copy")


def _embedding(source: str, target: str) -> Iterator[Row]:
    yield Row(f"{source}.weight", (f"{target}/embedding",), "copy")


def _fused_attention(
    source: str,
    target: str,
    qkv: tuple[str, str] = (".in_proj_weight", ".in_proj_bias"),
    out: str = "out_proj",
) -> Iterator[Row]:
    """``nn.MultiheadAttention`` and the ViT's: q, k, v in one matrix."""
    for name, kind, suffix in ((qkv[0], "linear", "kernel"), (qkv[1], "copy", "bias")):
        yield Row(source + name, tuple(f"{target}/{p}/{suffix}" for p in "qkv"), kind)
    yield from _affine(f"{source}.{out}", f"{target}/out", "linear_out")


def _sam_attention(source: str, target: str) -> Iterator[Row]:
    """``Attention`` of ``sam3/sam/transformer.py``: separate projections."""
    for part in "qkv":
        yield from _affine(f"{source}.{part}_proj", f"{target}/{part}")
    yield from _affine(f"{source}.out_proj", f"{target}/out", "linear_out")


def _head(source: str, target: str, depth: int) -> Iterator[Row]:
    for i in range(depth):
        yield from _affine(f"{source}.layers.{i}", f"{target}/layer_{i}")


def _vision(config: ModelConfig) -> Iterator[Row]:
    source, target = "detector.backbone.vision_backbone", "vision"
    trunk = f"{source}.trunk"
    yield Row(f"{trunk}.patch_embed.proj.weight", ("vision/trunk/patch_embed/kernel",), "conv")
    yield Row(POS_EMBED, (POS_EMBED_PARAM,), "copy", (0,))
    yield from _norm(f"{trunk}.ln_pre", "vision/trunk/norm_pre")
    for i in range(config.vision.depth):
        s, t = f"{trunk}.blocks.{i}", f"vision/trunk/block_{i}"
        yield from _norm(f"{s}.norm1", f"{t}/norm1")
        yield from _fused_attention(f"{s}.attn", f"{t}/attn", (".qkv.weight", ".qkv.bias"), "proj")
        yield from _norm(f"{s}.norm2", f"{t}/norm2")
        yield from _affine(f"{s}.mlp.fc1", f"{t}/mlp/fc1")
        yield from _affine(f"{s}.mlp.fc2", f"{t}/mlp/fc2")
    for convs, neck in (("convs", "detector_neck"), ("sam2_convs", "tracker_neck")):
        s, t = f"{source}.{convs}", f"{target}/{neck}"
        yield from _affine(f"{s}.0.dconv_2x2_0", f"{t}/level_0_up_0", "conv")
        yield from _affine(f"{s}.0.dconv_2x2_1", f"{t}/level_0_up_1", "conv")
        yield from _affine(f"{s}.1.dconv_2x2", f"{t}/level_1_up_0", "conv")
        for i in range(3):
            for conv in ("conv_1x1", "conv_3x3"):
                yield from _affine(f"{s}.{i}.{conv}", f"{t}/level_{i}_{conv}", "conv")


def _text(config: ModelConfig) -> Iterator[Row]:
    source = "detector.backbone.language_backbone"
    encoder = f"{source}.encoder"
    yield Row(f"{encoder}.positional_embedding", ("text/pos_embed/embedding",), "copy")
    yield from _embedding(f"{encoder}.token_embedding", "text/token_embed")
    for i in range(config.text.depth):
        s, t = f"{encoder}.transformer.resblocks.{i}", f"text/block_{i}"
        yield from _fused_attention(f"{s}.attn", f"{t}/attn")
        yield from _norm(f"{s}.ln_1", f"{t}/norm1")
        yield from _norm(f"{s}.ln_2", f"{t}/norm2")
        yield from _affine(f"{s}.mlp.c_fc", f"{t}/mlp/fc1")
        yield from _affine(f"{s}.mlp.c_proj", f"{t}/mlp/fc2")
    yield from _norm(f"{encoder}.ln_final", "text/norm_final")
    yield from _affine(f"{source}.resizer", "text/resizer")


def _cross_attention_layer(source: str, target: str) -> Iterator[Row]:
    yield from _fused_attention(f"{source}.self_attn", f"{target}/self_attn")
    yield from _fused_attention(f"{source}.cross_attn_image", f"{target}/cross_attn")
    yield from _affine(f"{source}.linear1", f"{target}/ffn/fc1")
    yield from _affine(f"{source}.linear2", f"{target}/ffn/fc2")
    for i in (1, 2, 3):
        yield from _norm(f"{source}.norm{i}", f"{target}/norm{i}")


def _geometry(config: ModelConfig) -> Iterator[Row]:
    s, t = "detector.geometry_encoder", "geometry"
    yield from _embedding(f"{s}.label_embed", f"{t}/label_embed")
    yield from _embedding(f"{s}.cls_embed", f"{t}/class_embed")
    for ours, theirs in (("point", "points"), ("box", "boxes")):
        yield from _affine(f"{s}.{theirs}_direct_project", f"{t}/{ours}_direct")
        kind = "conv" if ours == "box" else "linear"
        yield from _affine(f"{s}.{theirs}_pool_project", f"{t}/{ours}_pool", kind)
        yield from _affine(f"{s}.{theirs}_pos_enc_project", f"{t}/{ours}_sine")
    yield from _affine(f"{s}.final_proj", f"{t}/proj")
    yield from _norm(f"{s}.norm", f"{t}/norm")
    yield from _norm(f"{s}.img_pre_norm", f"{t}/image_norm")
    for i in range(config.geometry.depth):
        yield from _cross_attention_layer(f"{s}.encode.{i}", f"{t}/layer_{i}")
    yield from _norm(f"{s}.encode_norm", f"{t}/norm_final")


def _fusion(config: ModelConfig) -> Iterator[Row]:
    for i in range(config.fusion.depth):
        yield from _cross_attention_layer(
            f"detector.transformer.encoder.layers.{i}", f"fusion/layer_{i}"
        )


def _decoder(config: ModelConfig) -> Iterator[Row]:
    source, target = "detector.transformer.decoder", "decoder"
    for i in range(config.decoder.depth):
        s, t = f"{source}.layers.{i}", f"{target}/layer_{i}"
        for theirs, ours in (
            ("cross_attn", "image_attn"),
            ("ca_text", "prompt_attn"),
            ("self_attn", "self_attn"),
        ):
            yield from _fused_attention(f"{s}.{theirs}", f"{t}/{ours}")
        for theirs, ours in (
            ("norm1", "norm_image"),
            ("catext_norm", "norm_prompt"),
            ("norm2", "norm_self"),
            ("norm3", "norm_ffn"),
        ):
            yield from _norm(f"{s}.{theirs}", f"{t}/{ours}")
        yield from _affine(f"{s}.linear1", f"{t}/ffn/fc1")
        yield from _affine(f"{s}.linear2", f"{t}/ffn/fc2")
    yield from _norm(f"{source}.norm", f"{target}/norm")
    yield from _head(f"{source}.bbox_embed", f"{target}/box_head", 3)
    yield from _embedding(f"{source}.query_embed", f"{target}/query_embed")
    yield from _embedding(f"{source}.reference_points", f"{target}/reference_points")
    yield from _head(f"{source}.boxRPB_embed_x", f"{target}/box_bias/x", 2)
    yield from _head(f"{source}.boxRPB_embed_y", f"{target}/box_bias/y", 2)
    yield from _embedding(f"{source}.presence_token", f"{target}/presence_token")
    yield from _head(f"{source}.presence_token_head", f"{target}/presence_head", 3)
    yield from _norm(f"{source}.presence_token_out_norm", f"{target}/presence_norm")
    yield from _head(f"{source}.ref_point_head", f"{target}/reference_head", 2)


def _heads(config: ModelConfig) -> Iterator[Row]:
    s, t = "detector.segmentation_head", "segmentation"
    for i in range(2):
        yield from _affine(f"{s}.pixel_decoder.conv_layers.{i}", f"{t}/conv_{i}", "conv")
        yield from _norm(f"{s}.pixel_decoder.norms.{i}", f"{t}/norm_{i}")
    yield from _head(f"{s}.mask_predictor.mask_embed", f"{t}/mask_head", 3)
    yield from _fused_attention(f"{s}.cross_attend_prompt", f"{t}/prompt_attn")
    yield from _norm(f"{s}.cross_attn_norm", f"{t}/prompt_norm")
    yield from _affine(f"{s}.semantic_seg_head", f"{t}/semantic", "conv")
    yield from _affine(f"{s}.instance_seg_head", f"{t}/instance", "conv")
    s, t = "detector.dot_prod_scoring", "scoring"
    yield from _affine(f"{s}.prompt_mlp.layers.0", f"{t}/prompt_mlp/fc1")
    yield from _affine(f"{s}.prompt_mlp.layers.1", f"{t}/prompt_mlp/fc2")
    yield from _norm(f"{s}.prompt_mlp.out_norm", f"{t}/prompt_norm")
    yield from _affine(f"{s}.prompt_proj", f"{t}/prompt_proj")
    yield from _affine(f"{s}.hs_proj", f"{t}/query_proj")


def _memory(config: ModelConfig) -> Iterator[Row]:
    yield Row("tracker.maskmem_tpos_enc", ("tracker/memory_time_embed/embedding",), "copy", (1, 2))
    yield Row("tracker.no_mem_embed", ("tracker/no_memory_embed/embedding",), "copy", (0,))
    yield Row("tracker.no_obj_ptr", ("tracker/no_object_pointer/embedding",), "copy")
    yield Row("tracker.no_obj_embed_spatial", ("tracker/no_object_embed/embedding",), "copy")
    yield from _affine("tracker.mask_downsample", "tracker/mask_downsample", "conv")
    source, target = "tracker.transformer.encoder", "tracker/memory_attention"
    for i in range(config.memory.attention_depth):
        s, t = f"{source}.layers.{i}", f"{target}/layer_{i}"
        yield from _sam_attention(f"{s}.self_attn", f"{t}/self_attn")
        yield from _sam_attention(f"{s}.cross_attn_image", f"{t}/cross_attn")
        yield from _affine(f"{s}.linear1", f"{t}/ffn/fc1")
        yield from _affine(f"{s}.linear2", f"{t}/ffn/fc2")
        for j in (1, 2, 3):
            yield from _norm(f"{s}.norm{j}", f"{t}/norm{j}")
    yield from _norm(f"{source}.norm", f"{target}/norm")
    s, t = "tracker.maskmem_backbone", "tracker/memory_encoder"
    for i in range(4):
        down = f"{t}/mask_downsampler"
        yield from _affine(f"{s}.mask_downsampler.encoder.{3 * i}", f"{down}/conv_{i}", "conv")
        yield from _norm(f"{s}.mask_downsampler.encoder.{3 * i + 1}", f"{down}/norm_{i}")
    yield from _affine(f"{s}.mask_downsampler.encoder.12", f"{t}/mask_downsampler/out", "conv")
    yield from _affine(f"{s}.pix_feat_proj", f"{t}/pixel_proj", "conv")
    for i in range(config.memory.fuser_depth):
        layer, block = f"{s}.fuser.layers.{i}", f"{t}/block_{i}"
        yield Row(f"{layer}.gamma", (f"{block}/gamma",), "copy")
        yield from _affine(f"{layer}.dwconv", f"{block}/dwconv", "conv")
        yield from _norm(f"{layer}.norm", f"{block}/norm")
        yield from _affine(f"{layer}.pwconv1", f"{block}/mlp/fc1")
        yield from _affine(f"{layer}.pwconv2", f"{block}/mlp/fc2")
    yield from _affine(f"{s}.out_proj", f"{t}/out_proj", "conv")
    yield from _head("tracker.obj_ptr_proj", "tracker/pointer_head", 3)
    yield from _affine("tracker.obj_ptr_tpos_proj", "tracker/pointer_time_proj")


def _prompt_encoder() -> Iterator[Row]:
    s, t = "tracker.sam_prompt_encoder", "tracker/prompt_encoder"
    yield Row(f"{s}.pe_layer.positional_encoding_gaussian_matrix", (f"{t}/gaussian",), "copy")
    for i in range(4):
        yield Row(f"{s}.point_embeddings.{i}.weight", (f"{t}/point_embed/embedding[{i}]",), "copy")
    for name in ("not_a_point_embed", "no_mask_embed"):
        yield from _embedding(f"{s}.{name}", f"{t}/{name}")
    for i in range(3):
        yield from _affine(f"{s}.mask_downscaling.{3 * i}", f"{t}/mask_conv_{i}", "conv")
    for i in range(2):
        yield from _norm(f"{s}.mask_downscaling.{3 * i + 1}", f"{t}/mask_norm_{i}")


def _mask_decoder(config: ModelConfig) -> Iterator[Row]:
    source, target = "tracker.sam_mask_decoder", "tracker/mask_decoder"
    for i in range(config.sam.depth):
        s, t = f"{source}.transformer.layers.{i}", f"{target}/blocks_{i}"
        yield from _sam_attention(f"{s}.self_attn", f"{t}/self_attn")
        yield from _sam_attention(f"{s}.cross_attn_token_to_image", f"{t}/token_to_image")
        yield from _sam_attention(f"{s}.cross_attn_image_to_token", f"{t}/image_to_token")
        yield from _affine(f"{s}.mlp.lin1", f"{t}/mlp/fc1")
        yield from _affine(f"{s}.mlp.lin2", f"{t}/mlp/fc2")
        for j in (1, 2, 3, 4):
            yield from _norm(f"{s}.norm{j}", f"{t}/norm{j}")
    s, t = source, target
    yield from _sam_attention(f"{s}.transformer.final_attn_token_to_image", f"{t}/final_attn")
    yield from _norm(f"{s}.transformer.norm_final_attn", f"{t}/norm_final")
    yield from _embedding(f"{s}.iou_token", f"{t}/iou_token")
    yield from _embedding(f"{s}.mask_tokens", f"{t}/mask_tokens")
    yield from _embedding(f"{s}.obj_score_token", f"{t}/object_token")
    yield from _affine(f"{s}.output_upscaling.0", f"{t}/upscale_0", "conv")
    yield from _norm(f"{s}.output_upscaling.1", f"{t}/upscale_norm")
    yield from _affine(f"{s}.output_upscaling.3", f"{t}/upscale_1", "conv")
    for i in range(2):
        yield from _affine(f"{s}.conv_s{i}", f"{t}/level_conv_{i}", "conv")
    for i in range(1 + config.sam.num_multimask):
        yield from _head(f"{s}.output_hypernetworks_mlps.{i}", f"{t}/hypernetworks_{i}", 3)
    yield from _head(f"{s}.iou_prediction_head", f"{t}/iou_head", 3)
    yield from _head(f"{s}.pred_obj_score_head", f"{t}/object_head", 3)


def build_table(config: ModelConfig) -> list[Row]:
    """All rows for a configuration."""
    return [
        *_vision(config),
        *_text(config),
        *_geometry(config),
        *_fusion(config),
        *_decoder(config),
        *_heads(config),
        *_memory(config),
        *_prompt_encoder(),
        *_mask_decoder(config),
    ]


def unused_names(config: ModelConfig) -> list[str]:
    """Tensors of ``sam3.pt`` that no released code reads; kept verbatim to be written back."""
    vision = "detector.backbone.vision_backbone"
    names = [f"{vision}.trunk.blocks.{i}.attn.freqs_cis" for i in range(config.vision.depth)]
    for convs in ("convs", "sam2_convs"):
        for conv in ("conv_1x1", "conv_3x3"):
            names += [f"{vision}.{convs}.3.{conv}.{p}" for p in ("weight", "bias")]
    pixels = "detector.segmentation_head.pixel_decoder"
    names += [f"{pixels}.{m}.2.{p}" for m in ("conv_layers", "norms") for p in ("weight", "bias")]
    names += ["detector.backbone.language_backbone.encoder.text_projection"]
    names += ["tracker.no_mem_pos_enc"]
    return names

"""transformers' names against ours: complete at the released size, right at a small one."""

from __future__ import annotations

import dataclasses

import numpy as np
import oracle
import pytest
import torch
from oracle.params import params_from_hf

from sam3_jax import config as config_lib
from sam3_jax.checkpoint import flatten
from sam3_jax.convert import hf_names
from sam3_jax.convert.errors import ConversionError
from sam3_jax.convert.export import HF_LAYOUTS, to_hf_tensors, to_torch_names
from sam3_jax.convert.layout import find_layout, hf_layout, release_layout

BUILD = {
    "Sam3Model": oracle.detector,
    "Sam3TrackerModel": oracle.tracker,
    "Sam3TrackerVideoModel": oracle.tracker_video,
    "Sam3VideoModel": oracle.video,
}
# transformers fixes 64 channels of memory; the tracker has no projection to them from 64.
SMALL = dataclasses.replace(config_lib.tiny(), dim=128)
SMALL.memory.dim = 64
TRUNK = "detector.backbone.vision_backbone.trunk"


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    """All four classes, small, with random weights."""
    return {name: oracle.randomize(build(SMALL), seed=0) for name, build in BUILD.items()}


@pytest.mark.parametrize("name", HF_LAYOUTS)
def test_every_tensor_of_the_released_size_is_named_once(name: str) -> None:
    config = config_lib.sam3()
    with torch.device("meta"):
        expected = list(BUILD[name](config).state_dict())
    layout = hf_layout(name, config)
    named = [row.source for row in layout.rows] + [item.source for item in layout.unused]
    named += layout.copies
    assert sorted(named) == sorted(expected)


def test_the_video_model_reaches_every_parameter_that_hf_has() -> None:
    config = config_lib.sam3()
    released, video = release_layout(config), hf_layout("Sam3VideoModel", config)

    def targets(rows: list) -> set[str]:
        return {target.partition("[")[0] for row in rows for target in row.targets}

    lacking = targets(released.rows) - targets(video.rows)
    parts = ("direct", "pool", "sine")
    points = {f"geometry/point_{part}/{leaf}" for part in parts for leaf in ("kernel", "bias")}
    assert lacking == points
    dropped = {item.stored for item in released.unused} - {item.stored for item in video.unused}
    assert dropped == {f"{TRUNK}.blocks.{i}.attn.freqs_cis" for i in range(config.vision.depth)}


@pytest.mark.parametrize("name", HF_LAYOUTS)
def test_there_and_back_is_exact(name: str, models: dict[str, torch.nn.Module]) -> None:
    state = models[name].state_dict()
    unused = {
        item.stored: state[item.source].numpy().T if item.transposed else state[item.source].numpy()
        for item in hf_layout(name, SMALL).unused
    }
    back = to_hf_tensors(params_from_hf(models[name], SMALL), unused, SMALL, name)
    assert sorted(back) == sorted(state)
    for key, array in back.items():
        np.testing.assert_array_equal(array, state[key].numpy(), err_msg=key)


def test_upstream_gets_the_numbers_where_upstream_reads_them(
    models: dict[str, torch.nn.Module],
) -> None:
    """Written from upstream's code and not from the table: joined, split and renamed tensors."""
    state = {name: t.numpy() for name, t in models["Sam3VideoModel"].state_dict().items()}
    made = to_torch_names(params_from_hf(models["Sam3VideoModel"], SMALL), {}, SMALL)

    def joined(prefix: str, part: str) -> np.ndarray:
        return np.concatenate([state[f"{prefix}.{p}_proj.{part}"] for p in "qkv"])

    vision, detector = "detector_model.vision_encoder", "detector_model.detr_decoder"
    tracker, head = "tracker_model", "tracker.sam_mask_decoder"
    attention = f"{vision}.backbone.layers.3.attention"
    text = "text_encoder.text_model.encoder.layers.1"
    resblock = "detector.backbone.language_backbone.encoder.transformer.resblocks.1"
    layer = "detector.transformer.decoder.layers.2"
    expected = {
        f"{TRUNK}.blocks.3.attn.qkv.weight": joined(attention, "weight"),
        f"{TRUNK}.blocks.3.attn.qkv.bias": joined(attention, "bias"),
        f"{TRUNK}.blocks.3.attn.proj.weight": state[f"{attention}.o_proj.weight"],
        "detector.backbone.vision_backbone.convs.0.dconv_2x2_1.weight": state[
            f"{vision}.neck.fpn_layers.0.scale_layers.2.weight"
        ],
        "detector.backbone.vision_backbone.sam2_convs.2.conv_3x3.weight": state[
            "tracker_neck.fpn_layers.2.proj2.weight"
        ],
        f"{resblock}.attn.in_proj_weight": joined(f"detector_model.{text}.self_attn", "weight"),
        f"{layer}.norm1.weight": state[f"{detector}.layers.2.vision_cross_attn_layer_norm.weight"],
        f"{layer}.norm2.weight": state[f"{detector}.layers.2.self_attn_layer_norm.weight"],
        f"{layer}.norm3.weight": state[f"{detector}.layers.2.mlp_layer_norm.weight"],
        f"{layer}.ca_text.in_proj_bias": joined(f"{detector}.layers.2.text_cross_attn", "bias"),
        "detector.transformer.decoder.boxRPB_embed_y.layers.1.weight": state[
            f"{detector}.box_rpb_embed_y.layer2.weight"
        ],
        "tracker.sam_prompt_encoder.point_embeddings.2.weight": state[
            f"{tracker}.prompt_encoder.point_embed.weight"
        ][2:3],
        f"{head}.iou_prediction_head.layers.1.weight": state[
            f"{tracker}.mask_decoder.iou_prediction_head.layers.0.weight"
        ],
        f"{head}.output_upscaling.3.weight": state[f"{tracker}.mask_decoder.upscale_conv2.weight"],
        "tracker.maskmem_backbone.mask_downsampler.encoder.4.weight": state[
            f"{tracker}.memory_encoder.mask_downsampler.layers.1.layer_norm.weight"
        ],
        "tracker.maskmem_backbone.fuser.layers.1.gamma": state[
            f"{tracker}.memory_encoder.memory_fuser.layers.1.scale"
        ],
        "tracker.maskmem_tpos_enc": state[f"{tracker}.memory_temporal_positional_encoding"],
    }
    for name, array in expected.items():
        np.testing.assert_array_equal(made[name], array, err_msg=name)


@pytest.mark.parametrize("name", HF_LAYOUTS)
def test_names_of_saved_files(name: str, models: dict[str, torch.nn.Module], tmp_path) -> None:
    """save_pretrained adds prefixes that state_dict does not have."""
    models[name].save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "np") as file:
        saved = [hf_names.normal_name(key) for key in file.keys()]  # noqa: SIM118
    layout = find_layout(saved, SMALL, "file")
    named = {row.source for row in layout.rows} | {item.source for item in layout.unused}
    assert set(saved) <= named | set(layout.copies)
    sources = {row.source for row in hf_layout(name, SMALL).rows}
    found = {target for row in layout.rows if row.source in saved for target in row.targets}
    assert found == {t for row in hf_layout(name, SMALL).rows for t in row.targets}
    assert len(sources) == len(hf_layout(name, SMALL).rows)


def test_all_classes_give_a_shared_part_the_same_parameters(
    models: dict[str, torch.nn.Module],
) -> None:
    """``randomize`` fills the ViT alike in every class; so must ours be, and of our shapes."""
    trunks = [
        {k: v for k, v in flatten(params_from_hf(m, SMALL)).items() if k.startswith("vision/trunk")}
        for m in models.values()
    ]
    assert len(trunks[0]) > 50
    for trunk in trunks[1:]:
        assert trunk.keys() == trunks[0].keys()
        for path, array in trunk.items():
            np.testing.assert_array_equal(array, trunks[0][path], err_msg=path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tracker.model.interactive_convs.0.weight"], "SAM 3.1"),
        (["vision_encoder.backbone.blocks.0.attn.qkv.weight", "memory.x"], "not named like"),
        ([], "not named like"),
    ],
)
def test_other_models_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        find_layout(names, SMALL, "model.safetensors")

"""Seeded weights that keep a randomly filled SAM 3 alive.

Drawing every tensor from one distribution gives a network that tests little: deep residual stacks
explode, 5184-key attention averages everything away, box refinement and presence stay at a
constant. The rules below give each tensor the scale at which activations stay of order one,
attention is selective, and every head's output spreads over its useful range, so that a wrong
wire anywhere moves the outputs. They read names, HF's and those of ``sam3.pt`` alike.
"""

from __future__ import annotations

import math
import re
import zlib

import torch
from transformers import Sam3VideoModel

# How far above (or below) 1/sqrt(fan-in) a matrix is drawn; the first pattern found decides.
_GAINS = tuple(
    (re.compile(pattern), gain)
    for pattern, gain in (
        # Keys of the decoder's image attention are not normalised: softer queries instead.
        (r"detr_decoder\.layers\.\d+\.vision_cross_attn\.q_proj", 1.0),
        (r"detr_encoder\.layers\.\d+\.(self|cross)_attn\.q_proj", 1.5),
        (r"q_proj\.weight", 2.0),
        # Ends of residual branches: what all tokens receive alike (attention over thousands of
        # keys, the mean of an activation) must not drown what tells them apart.
        (r"(backbone|trunk)\..*(attention\.o_proj|attn\.proj|mlp\.fc2)", 0.25),
        (r"text_model.*(out_proj|fc2)|resblocks.*(out_proj|c_proj)", 0.5),
        (r"detr_encoder\.layers.*(o_proj|fc2)|r\.encoder\.layers.*(out_proj|linear2)", 0.5),
        (r"decoder\.layers\.\d+\.(text_cross_attn\.o|ca_text\.out|self_attn\.o(ut)?)_proj", 0.25),
        (r"decoder\.layers\.\d+\.(vision_cross_attn\.o|cross_attn\.out)_proj", 0.25),
        (r"decoder\.layers\.\d+\.(mlp\.fc2|linear2)", 0.5),
        # Last layers of heads.
        (r"(presence_head\.layer3|presence_token_head\.layers\.2)", 2.5),
        (r"(box_rpb_embed_[xy]\.layer2|boxRPB_embed_[xy]\.layers\.1)", 3.0),
        (r"(box_head\.layer3|bbox_embed\.layers\.2)", 0.6),
        (r"(query_proj|hs_proj)", 3.0),
        (r"(iou_prediction_head|pred_obj_score_head)\.(proj_out|layers\.2)", 4.0),
        (r"output_hypernetworks_mlps\.\d+\.(proj_out|layers\.2)", 2.0),
    )
)
# Learned vectors that are added or looked up, with their standard deviation.
_TABLES = tuple(
    (re.compile(rf"(?:^|\.)(?:{names})(?:\.\d)?(?:\.weight)?$"), std)
    for names, std in (
        ("query_embed|presence_token|label_embed|cls_embed", 1.0),
        ("iou_token|mask_tokens|obj_score_token", 1.0),
        ("reference_points", 1.2),
        (r"shared_\w*embedding\.positional_embedding|positional_encoding_gaussian_matrix", 1.0),
        ("token_embedding|pos(?:ition|itional)?_embed(?:ding|dings)?", 0.5),
        ("point_embed(?:dings)?|not_a_point_embed|no_mask_embed", 0.5),
        ("maskmem_tpos_enc|memory_temporal_positional_encoding", 0.5),
        (r"no_(?:mem|obj)\w*|occlusion_spatial_embedding_parameter", 0.5),
    )
)
_CONV_TRANSPOSE = re.compile(r"(dconv_2x2|scale_layers|upscale_conv|output_upscaling)")


def _fan_in(name: str, shape: tuple[int, ...]) -> int:
    if len(shape) == 4 and _CONV_TRANSPOSE.search(name):
        return shape[0]  # stride equals kernel: one tap a channel
    return math.prod(shape[1:])


def scale_of(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation for one tensor, from its name and shape."""
    last = name.rsplit(".", 1)[-1]
    if last == "gamma" or (last == "scale" and len(shape) == 1):  # ConvNeXt layer scale
        return 0.5, 0.2
    for pattern, std in _TABLES:
        if pattern.search(name):
            return 0.0, std
    if last.endswith("bias"):
        return 0.0, 0.1
    if len(shape) == 1:  # scale of a normalisation
        return 1.0, 0.2
    gain = next((gain for pattern, gain in _GAINS if pattern.search(name)), 1.0)
    return 0.0, gain / math.sqrt(_fan_in(name, shape))


@torch.no_grad()
def fill(tensor: torch.Tensor, name: str, key: str, seed: int) -> None:
    """Fills a tensor in place; ``name`` chooses the scale, ``key`` and ``seed`` the values."""
    mean, std = scale_of(name, tuple(tensor.shape))
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{key}".encode()))
    tensor.normal_(mean, std, generator=generator)
    if re.search(r"(in_proj_weight|qkv\.weight)$", name):
        tensor[: len(tensor) // 3] *= 2  # queries, as q_proj above


def randomize(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Fills every stored parameter and buffer of an HF model in place and returns it.

    A ViT gets the same values in whichever class it sits (detector and tracker share it in the
    release); everything else differs by class.
    """
    trunk = "vision_encoder.backbone."
    for name, tensor in model.state_dict().items():
        at = name.find(trunk)
        key = name[at:] if at >= 0 else f"{type(model).__name__}.{name}"
        fill(tensor, name, key, seed)
    tie_position_matrices(model)
    return model


@torch.no_grad()
def tie_position_matrices(model: torch.nn.Module) -> None:
    """Gives both copies of the prompt encoder's Gaussian matrix one value, as a release has it."""
    for module in model.modules():
        if hasattr(module, "shared_image_embedding"):
            module.shared_image_embedding.positional_embedding.copy_(
                module.prompt_encoder.shared_embedding.positional_embedding
            )


def adopt(model: torch.nn.Module, video_model: Sam3VideoModel) -> torch.nn.Module:
    """Gives a tracker the weights that it has in the whole.

    By hand: transformers 5.23 does not find them in a saved ``Sam3VideoModel``.
    """
    parts = {
        "tracker_model.": "",
        "tracker_neck.": "vision_encoder.neck.",
        "detector_model.vision_encoder.backbone.": "vision_encoder.backbone.",
    }
    state = {
        new + name.removeprefix(old): tensor
        for name, tensor in video_model.state_dict().items()
        for old, new in parts.items()
        if name.startswith(old)
    }
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model

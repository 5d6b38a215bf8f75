"""Sizes that the configuration and the parameters both tell, and which must agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sam3_jax.checkpoint.description import CONFIG
from sam3_jax.checkpoint.errors import CheckpointError
from sam3_jax.config import ModelConfig

# Field of the configuration, a parameter (or a numbered module), and which of its axes has that
# size (None: how many there are; for the hypernetworks one more).
SIZES: tuple[tuple[str, str, int | None], ...] = (
    ("vision.dim", "vision/trunk/patch_embed/kernel", 3),
    ("vision.depth", "vision/trunk/block_", None),
    ("vision.num_heads", "vision/trunk/block_0/attn/q/kernel", 1),
    ("vision.mlp_dim", "vision/trunk/block_0/mlp/fc1/kernel", 1),
    ("vision.pos_grid", "vision/trunk/pos_embed", 0),
    ("text.vocab_size", "text/token_embed/embedding", 0),
    ("text.context_length", "text/pos_embed/embedding", 0),
    ("text.dim", "text/pos_embed/embedding", 1),
    ("text.depth", "text/block_", None),
    ("text.num_heads", "text/block_0/attn/q/kernel", 1),
    ("text.mlp_dim", "text/block_0/mlp/fc1/kernel", 1),
    ("dim", "geometry/proj/kernel", 1),
    ("geometry.depth", "geometry/layer_", None),
    ("geometry.num_heads", "geometry/layer_0/self_attn/q/kernel", 1),
    ("geometry.mlp_dim", "geometry/layer_0/ffn/fc1/kernel", 1),
    ("geometry.roi_size", "geometry/box_pool/kernel", 0),
    ("fusion.depth", "fusion/layer_", None),
    ("fusion.num_heads", "fusion/layer_0/self_attn/q/kernel", 1),
    ("fusion.mlp_dim", "fusion/layer_0/ffn/fc1/kernel", 1),
    ("decoder.depth", "decoder/layer_", None),
    ("decoder.num_heads", "decoder/layer_0/self_attn/q/kernel", 1),
    ("decoder.mlp_dim", "decoder/layer_0/ffn/fc1/kernel", 1),
    ("decoder.num_queries", "decoder/query_embed/embedding", 0),
    ("scoring.mlp_dim", "scoring/prompt_mlp/fc1/kernel", 1),
    ("segmentation.num_heads", "segmentation/prompt_attn/q/kernel", 1),
    ("dim", "tracker/no_memory_embed/embedding", 1),
    ("sam.depth", "tracker/mask_decoder/blocks_", None),
    ("sam.num_heads", "tracker/mask_decoder/blocks_0/self_attn/q/kernel", 1),
    ("sam.mlp_dim", "tracker/mask_decoder/blocks_0/mlp/fc1/kernel", 1),
    ("sam.mask_channels", "tracker/prompt_encoder/mask_conv_1/kernel", 3),
    ("sam.num_multimask", "tracker/mask_decoder/hypernetworks_", None),
    ("memory.dim", "tracker/memory_time_embed/embedding", 1),
    ("memory.num_maps", "tracker/memory_time_embed/embedding", 0),
    ("memory.attention_depth", "tracker/memory_attention/layer_", None),
    ("memory.attention_heads", "tracker/memory_attention/layer_0/self_attn/q/kernel", 1),
    ("memory.mlp_dim", "tracker/memory_attention/layer_0/ffn/fc1/kernel", 1),
    ("memory.fuser_depth", "tracker/memory_encoder/block_", None),
)


def check_sizes(folder: Path, config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises where config.json is not about these parameters, naming every field that differs."""
    problems = _check_patches(config, shapes)
    for field, path, axis in SIZES:
        if axis is None:
            numbers = {n[len(path) :].split("/")[0] for n in shapes if n.startswith(path)}
            actual = len(numbers) - (field == "sam.num_multimask" and bool(numbers))
        else:
            shape = shapes.get(path, ())
            actual = shape[axis] if axis < len(shape) else 0
        expected: Any = config
        for name in field.split("."):
            expected = getattr(expected, name)
        if actual and actual != expected:
            problems.append(f"{field} is {expected}, the parameters have {actual}")
    if problems:
        raise CheckpointError(
            f"{folder / CONFIG}: does not fit the parameters beside it: {'; '.join(problems)}; "
            "restore the file or convert again"
        )


def _check_patches(config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Problems of ``vision.stem`` and ``vision.patch_size``: the stem halves before the patches."""
    trunk = "vision/trunk"
    if f"{trunk}/patch_embed/kernel" not in shapes:
        return []
    stem = []
    while (kernel := f"{trunk}/stem_{len(stem)}/down/kernel") in shapes:
        stem.append(shapes[kernel][-1])
    problems = []
    if tuple(stem) != config.vision.stem:
        problems.append(f"vision.stem is {config.vision.stem}, the parameters have {tuple(stem)}")
    patch = shapes[f"{trunk}/patch_embed/kernel"][0] * 2 ** len(stem)
    if patch != config.vision.patch_size:
        problems.append(
            f"vision.patch_size is {config.vision.patch_size}, the parameters have {patch}"
        )
    return problems

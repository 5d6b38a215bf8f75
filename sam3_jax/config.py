"""Configuration of the model: nested dataclasses, named sizes, JSON.

Every default is the released model's (``sam3/model_builder.py`` upstream). The dataclasses are
mutable so that ``ml_collections.config_flags`` can override single fields; modules read them and
never write.

Two fields are for training and change no value. ``remat``: a block is computed again in the
backward pass instead of being kept. ``scan``: equal blocks are one loop of the compiled program
instead of being written out one by one; random numbers of dropout differ.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any


@dataclass
class VisionConfig:
    """ViT trunk and its feature pyramids (upstream ``model/vitdet.py``, ``model/necks.py``)."""

    patch_size: int = 14
    dim: int = 1024
    depth: int = 32
    num_heads: int = 16
    mlp_dim: int = 4736
    window_size: int = 24
    global_blocks: tuple[int, ...] = (7, 15, 23, 31)
    stem: tuple[int, ...] = ()  # widths of convolutions before the patches, each halves the picture
    pos_grid: int = 24  # side of the learned position table, tiled over larger grids
    rope_theta: float = 10000.0
    layer_norm_eps: float = 1e-5  # of the container that was converted; HF's files say 1e-6
    drop_path: float = 0.1
    remat: bool = False
    scan: bool = False


@dataclass
class TextConfig:
    """Causal text transformer (upstream ``model/text_encoder_ve.py``)."""

    vocab_size: int = 49408
    context_length: int = 32
    dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_dim: int = 4096
    layer_norm_eps: float = 1e-5
    remat: bool = False
    scan: bool = False


@dataclass
class GeometryConfig:
    """Encoder of points, boxes and masks as concept prompts (``model/geometry_encoders.py``)."""

    depth: int = 3
    num_heads: int = 8
    mlp_dim: int = 2048
    dropout: float = 0.1
    roi_size: int = 7
    mask_prompts: bool = False  # no released weights: switching it on adds untrained parameters


@dataclass
class FusionConfig:
    """Encoder that conditions image tokens on the prompt (``model/encoder.py``)."""

    depth: int = 6
    num_heads: int = 8
    mlp_dim: int = 2048
    dropout: float = 0.1
    num_levels: int = 1  # coarsest pyramid levels that are fused; released: the stride-14 one
    remat: bool = False
    scan: bool = False


@dataclass
class DecoderConfig:
    """DETR-style decoder (``model/decoder.py``)."""

    depth: int = 6
    num_heads: int = 8
    mlp_dim: int = 2048
    dropout: float = 0.1
    num_queries: int = 200
    spread_queries: bool = False  # fresh queries have boxes all over the picture and look into them
    remat: bool = False


@dataclass
class ScoringConfig:
    """Dot-product scoring of queries against the prompt (``model/model_misc.py``)."""

    mlp_dim: int = 2048
    dropout: float = 0.1
    clamp: float = 12.0


@dataclass
class SegmentationConfig:
    """Pixel decoder and mask heads (``model/maskformer_segmentation.py``)."""

    num_heads: int = 8
    num_groups: int = 8


@dataclass
class SamConfig:
    """Interactive head (``sam/prompt_encoder.py``, ``sam/mask_decoder.py``)."""

    depth: int = 2
    num_heads: int = 8
    mlp_dim: int = 2048
    attention_downsample: int = 2
    num_multimask: int = 3
    mask_channels: int = 16
    stability_delta: float = 0.05
    stability_threshold: float = 0.98


@dataclass
class MemoryConfig:
    """The tracker's memory (``model/memory.py``, ``model/sam3_tracker_base.py``)."""

    dim: int = 64
    num_maps: int = 7
    attention_depth: int = 4
    attention_heads: int = 1
    mlp_dim: int = 2048
    dropout: float = 0.1
    fuser_depth: int = 2
    rope_theta: float = 10000.0


@dataclass
class ModelConfig:
    """The whole of SAM 3. ``dim`` is the width that all parts behind the backbones share."""

    arch: str = "sam3"
    image_size: int = 1008
    dim: int = 256
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    geometry: GeometryConfig = field(default_factory=GeometryConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)
    sam: SamConfig = field(default_factory=SamConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)


def sam3() -> ModelConfig:
    """The released size: 860M parameters, 1008 pixels."""
    return ModelConfig()


def rematerialized(model: ModelConfig, *, scan: bool = False) -> ModelConfig:
    """``model`` whose layers are computed again in the backward pass: little memory, some time.

    ``scan``: equal blocks as loops besides, which TPUs need for a program that can be compiled.
    """
    for part in (model.vision, model.text, model.fusion, model.decoder):
        part.remat = True
    for part in (model.vision, model.text, model.fusion):
        part.scan = scan
    return model


def tiny() -> ModelConfig:
    """Every stage at toy size (112 pixels, an 8x8 grid of 4x4 windows): for tests."""
    return ModelConfig(
        image_size=112,
        dim=32,
        vision=VisionConfig(
            dim=48,
            depth=4,
            num_heads=3,
            mlp_dim=96,
            window_size=4,
            global_blocks=(1, 3),
            pos_grid=4,
        ),
        text=TextConfig(vocab_size=49408, dim=32, depth=2, num_heads=2, mlp_dim=64),
        geometry=GeometryConfig(depth=2, num_heads=4, mlp_dim=64),
        fusion=FusionConfig(depth=2, num_heads=4, mlp_dim=64),
        decoder=DecoderConfig(depth=3, num_heads=4, mlp_dim=64, num_queries=12),
        scoring=ScoringConfig(mlp_dim=64),
        segmentation=SegmentationConfig(num_heads=4, num_groups=8),
        sam=SamConfig(num_heads=4, mlp_dim=64),
        memory=MemoryConfig(dim=8, attention_depth=2, mlp_dim=64),
    )


def demo() -> ModelConfig:
    """Every stage, small enough to be trained on two cores and shipped (256 pixels, 16x16 grid)."""
    return ModelConfig(
        image_size=256,
        dim=64,
        vision=VisionConfig(
            patch_size=16,
            stem=(16, 32, 96, 192),
            dim=128,
            depth=4,
            num_heads=2,
            mlp_dim=384,
            window_size=4,
            global_blocks=(1, 3),
            pos_grid=4,
            drop_path=0.0,
        ),
        text=TextConfig(context_length=16, dim=64, depth=2, num_heads=4, mlp_dim=128),
        geometry=GeometryConfig(depth=1, num_heads=2, mlp_dim=256, dropout=0.0),
        fusion=FusionConfig(depth=2, num_heads=2, mlp_dim=256, dropout=0.0),
        decoder=DecoderConfig(
            depth=3, num_heads=2, mlp_dim=256, dropout=0.0, num_queries=32, spread_queries=True
        ),
        scoring=ScoringConfig(mlp_dim=256, dropout=0.0),
        segmentation=SegmentationConfig(num_heads=4),
        sam=SamConfig(num_heads=4, mlp_dim=256),
        memory=MemoryConfig(dim=16, attention_depth=2, mlp_dim=256, dropout=0.0),
    )


NAMED = {"sam3": sam3, "demo": demo, "tiny": tiny}


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dictionary of a configuration dataclass, ready for ``json.dump``."""
    return dataclasses.asdict(config)


def from_dict(data: dict[str, Any], cls: type = ModelConfig, where: str = "config") -> Any:
    """Inverse of :func:`to_dict`; missing fields keep their defaults.

    Raises:
      ValueError: on a name the configuration does not have (with the closest one) or a value of
        the wrong type.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected an object, got {type(data).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    default = cls()
    for name, value in data.items():
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{where}: unknown field {name!r}{hint}")
        old = getattr(default, name)
        if dataclasses.is_dataclass(old):
            values[name] = from_dict(value, type(old), f"{where}.{name}")
        elif isinstance(old, tuple):
            if not isinstance(value, list | tuple):
                raise ValueError(f"{where}.{name}: expected a list, got {value!r}")
            values[name] = tuple(value)
        elif isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
            values[name] = float(value)
        elif type(value) is not type(old):
            raise ValueError(f"{where}.{name}: expected {type(old).__name__}, got {value!r}")
        else:
            values[name] = value
    return cls(**values)

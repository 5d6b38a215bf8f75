"""SAM 3, Segment Anything with Concepts (arXiv 2511.16719), in JAX and Flax Linen.

The names here are what other programs may rely on; they are imported when first used, so that
``import sam3_jax`` itself costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sam3_jax.inference.automask import AutomaticMaskGenerator
    from sam3_jax.inference.image import ImagePredictor
    from sam3_jax.inference.options import Options
    from sam3_jax.inference.postprocess import Detections
    from sam3_jax.inference.prompts import Prompt
    from sam3_jax.video.config import VideoConfig
    from sam3_jax.video.display import VideoFrame
    from sam3_jax.video.predictor import VideoPredictor
    from sam3_jax.video.session import Session

__version__ = "0.1.0"
__all__ = [
    "AutomaticMaskGenerator",
    "Detections",
    "ImagePredictor",
    "Options",
    "Prompt",
    "Session",
    "VideoConfig",
    "VideoFrame",
    "VideoPredictor",
    "__version__",
]

_HOMES = {
    "AutomaticMaskGenerator": "sam3_jax.inference.automask",
    "Detections": "sam3_jax.inference.postprocess",
    "ImagePredictor": "sam3_jax.inference.image",
    "Options": "sam3_jax.inference.options",
    "Prompt": "sam3_jax.inference.prompts",
    "Session": "sam3_jax.video.session",
    "VideoConfig": "sam3_jax.video.config",
    "VideoFrame": "sam3_jax.video.display",
    "VideoPredictor": "sam3_jax.video.predictor",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sam3_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

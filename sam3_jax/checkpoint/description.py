"""A checkpoint's ``config.json``: format, architecture, parts, configuration, origin."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sam3_jax import config as config_lib
from sam3_jax.checkpoint.errors import CheckpointError
from sam3_jax.checkpoint.parts import PARTS
from sam3_jax.config import ModelConfig

FORMAT_VERSION = 1
ARCHITECTURES = ("sam3",)
CONFIG = "config.json"


def is_checkpoint(path: str | os.PathLike) -> bool:
    """Whether a folder looks like one that :func:`sam3_jax.checkpoint.save` wrote."""
    try:
        return "format_version" in json.loads((Path(path) / CONFIG).read_text())
    except (OSError, ValueError, TypeError):
        return False


def read_description(folder: Path) -> dict[str, Any]:
    """The contents of config.json, with a format and an architecture that we know."""
    remedy = "python convert_torch_weights.py --input WEIGHTS --output FOLDER makes one"
    if folder.is_file():
        raise CheckpointError(f"{folder}: a file, not a checkpoint folder; {remedy}")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; {remedy}")
    file = folder / CONFIG
    try:
        data = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no checkpoint, it has no {CONFIG}; {remedy}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); convert again") from error
    if not isinstance(data, dict) or "format_version" not in data:
        raise CheckpointError(
            f"{file}: is not of a converted checkpoint (a folder of PyTorch weights?); {remedy}"
        )
    if data["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: format version {data['format_version']!r}, this program reads "
            f"{FORMAT_VERSION}; update it, or convert the weights again"
        )
    if data.get("arch") not in ARCHITECTURES:
        raise CheckpointError(
            f"{file}: architecture {data.get('arch')!r}, this program knows "
            f"{', '.join(ARCHITECTURES)}; update it"
        )
    parts = data.get("parts")
    if not isinstance(parts, list) or not parts or not set(map(str, parts)) <= set(PARTS):
        raise CheckpointError(f"{file}: parts {parts!r}, not of {', '.join(PARTS)}; convert again")
    return data


def read_model(folder: Path, description: dict[str, Any]) -> ModelConfig:
    """The model's configuration in the contents of config.json."""
    model = description.get("model")
    try:
        if not isinstance(model, dict):
            raise ValueError(f"model: expected an object, got {model!r}")
        return config_lib.from_dict(model, where="model")
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}; correct it or convert again") from error

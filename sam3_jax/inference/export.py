"""Writes the model's entry points as StableHLO, for programs that have neither Flax nor this code.

An export is a folder; what a checkpoint has no weights for is left out::

    export.json             arguments, shapes, dtypes, platforms, configuration
    encode_image.stablehlo  pixels -> pyramids
    encode_text.stablehlo   token ids -> prompt tokens
    ground.stablehlo        pyramids, text, boxes -> instances
    click.stablehlo         pyramids, points, mask -> masks
    params.safetensors      the parameters: arguments of the programs, not constants in them

The programs are those of ``export_programs.py``, serialized by ``jax.export``; ``exported.py``
reads and calls them. Sizes may be free ("b" images, "t" phrases, "p" prompts), one program for all
numbers. That works for all four with portable attention. The kernels of TPUs and of cuDNN want one
platform and numbers (``batch``); readers of StableHLO other than jax may want numbers too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from sam3_jax import checkpoint
from sam3_jax import config as config_lib
from sam3_jax.checkpoint.staging import staging_folder
from sam3_jax.checkpoint.tree import flatten
from sam3_jax.config import ModelConfig
from sam3_jax.convert.safetensors_file import write_safetensors
from sam3_jax.inference import export_programs
from sam3_jax.inference.export_programs import Entry
from sam3_jax.inference.exported_files import (
    DESCRIPTION,
    PARAMETERS,
    SCHEMA_VERSION,
    ExportError,
)
from sam3_jax.inference.files import UsageError
from sam3_jax.inference.programs import compute_dtype
from sam3_jax.models.detector import Sam3

PLATFORMS = ("cpu", "cuda", "tpu")
_KNOWN_PLATFORMS = (*PLATFORMS, "rocm")


def export_model(
    params: dict,
    config: ModelConfig,
    folder: str | os.PathLike,
    *,
    platforms: Sequence[str] = PLATFORMS,
    batch: int | None = None,
    boxes: int = 4,
    points: int = 8,
    dtype: Any = "auto",
    portable_attention: bool = True,
    save_params: bool = True,
    overwrite: bool = False,
) -> Path:
    """Writes an export, all of it or nothing.

    Args:
      params: nested dictionary of arrays; the programs take them in the dtypes they have here.
      config: the model they belong to; its ``image_size`` is the exported one.
      folder: to make.
      platforms: where the programs shall run, of "cpu", "cuda", "rocm", "tpu".
      batch: number of images, of phrases and of prompts in a call; None leaves them free.
      boxes, points: slots of a prompt for exemplar boxes and for points.
      dtype: compute dtype; "auto" is float32 for CPUs alone and bfloat16 otherwise.
      portable_attention: plain XLA; False takes the kernels of the one platform, as the predictor
        does (cuDNN's only if jax's CUDA plugin is installed where this runs).
      save_params: False leaves the parameters out; ``load_exported`` is then given them.
      overwrite: replace an export that is there; anything else is never replaced.

    Returns:
      the folder.

    Raises:
      ExportError: on options or parameters that cannot be exported.
      CheckpointError: when the folder is taken, the disk is full, or writing fails.
    """
    target = Path(folder).absolute()
    _check_options(platforms, {"batch": batch, "boxes": boxes, "points": points})
    if not portable_attention and (batch is None or len(platforms) > 1):
        raise ExportError(
            "portable_attention=False needs one platform and a batch size, as the kernels do "
            f'(platforms=["tpu"], batch=1), got {", ".join(platforms)} and {batch}'
        )
    compute = _dtype(dtype, platforms)
    flat = flatten(params)
    programs, described = {}, {}
    for name, entry in export_programs.entries(Sam3(config, compute), set(params), boxes, points):
        paths = [path for path in flat if path.startswith(export_programs.PARAMETERS[name])]
        own = {path: flat[path] for path in paths}
        programs[name] = export_programs.trace(
            name, entry, own, platforms, batch, portable_attention
        )
        described[name] = _describe(name, entry, programs[name], sorted(own), batch)
    if not programs:
        raise ExportError("the parameters hold no image model: convert with --part all or image")
    used = {path: flat[path] for path in flat if _is_used(path, described)}
    description = {
        "schema_version": SCHEMA_VERSION,
        "model": config_lib.to_dict(config),
        "platforms": list(platforms),
        "batch": batch,
        "dtype": compute.name,
        "attention": "portable" if portable_attention else "platform",
        "jax_version": jax.__version__,
        "parameters": PARAMETERS if save_params else None,
        "programs": described,
    }
    _write(target, programs, description, used if save_params else {}, overwrite=overwrite)
    return target


def export_checkpoint(
    path: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    dtype: Any = "auto",
    platforms: Sequence[str] = PLATFORMS,
    batch: int | None = None,
    portable_attention: bool = True,
    overwrite: bool = False,
) -> str:
    """``infer.py --export``: exports a checkpoint folder and returns a line that says so.

    Args: see :func:`export_model`.

    Raises:
      UsageError: when the checkpoint or the folder cannot be used.
    """
    try:
        compute = _dtype(dtype, platforms)
        loaded = checkpoint.load(path, dtype=None if compute == jnp.float32 else compute)
        target = export_model(
            loaded.params,
            loaded.config,
            folder,
            platforms=platforms,
            batch=batch,
            dtype=compute,
            portable_attention=portable_attention,
            overwrite=overwrite,
        )
    except (ExportError, checkpoint.CheckpointError) as error:
        raise UsageError(str(error)) from error
    size = sum(file.stat().st_size for file in target.iterdir())
    names = ", ".join(sorted(file.stem for file in target.glob("*.stablehlo")))
    return f"{target}: {names} in {compute.name} for {', '.join(platforms)}; {size / 1e6:.1f} MB"


def _check_options(platforms: Sequence[str], sizes: dict[str, int | None]) -> None:
    if not platforms or isinstance(platforms, str) or not set(platforms) <= set(_KNOWN_PLATFORMS):
        raise ExportError(
            f"platforms must be some of {', '.join(_KNOWN_PLATFORMS)}, got {platforms!r}"
        )
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ExportError(f"{name} must be at least 1, got {size}")


def _dtype(dtype: Any, platforms: Sequence[str]) -> jnp.dtype:
    """Not by the platform of this process, as the predictor does: another one will run it."""
    if isinstance(dtype, str) and dtype == "auto":
        dtype = "float32" if set(platforms) == {"cpu"} else "bfloat16"
    try:
        return compute_dtype(dtype)
    except ValueError as error:
        raise ExportError(str(error)) from error


def _describe(
    name: str, entry: Entry, program: jax_export.Exported, paths: list[str], batch: int | None
) -> dict[str, Any]:
    """What export.json says about a program."""

    def sizes(shape: Sequence[Any]) -> list[int | str]:
        return [size if isinstance(size, int) else str(size) for size in shape]

    inputs = [
        {**value._asdict(), "shape": [batch or s if isinstance(s, str) else s for s in value.shape]}
        for value in entry.inputs
    ]
    outputs = [
        {"name": output, "shape": sizes(aval.shape), "dtype": aval.dtype.name}
        for output, aval in zip(entry.outputs, program.out_avals, strict=True)
    ]
    everything = [*paths, *(value.name for value in entry.inputs)]
    extra = ["platform index"] if len(program.platforms) > 1 else []
    return {
        "file": f"{name}.stablehlo",
        "calling_convention_version": program.calling_convention_version,
        "parameters": paths,
        "inputs": inputs,
        "outputs": outputs,
        # Order of the arguments of the module's main function: what is not read is not there.
        # The platform index counts in "platforms".
        "main_arguments": [*extra, *(everything[i] for i in program.module_kept_var_idx)],
    }


def _is_used(path: str, described: dict[str, Any]) -> bool:
    return any(path in spec["parameters"] for spec in described.values())


def _write(
    target: Path,
    programs: dict[str, jax_export.Exported],
    description: dict[str, Any],
    params: dict[str, Any],
    *,
    overwrite: bool,
) -> None:
    try:
        data = {name: bytes(program.serialize()) for name, program in programs.items()}
    except ImportError as error:
        raise ExportError("writing an export needs flatbuffers: pip install flatbuffers") from error
    need = sum(map(len, data.values())) + sum(leaf.nbytes for leaf in params.values())
    replace = overwrite and (target / DESCRIPTION).is_file()
    with staging_folder(target, need, replace=replace) as folder:
        for name, content in data.items():
            spec = description["programs"][name]
            spec["sha256"] = hashlib.sha256(content).hexdigest()
            (folder / spec["file"]).write_bytes(content)
        if params:
            arrays = {path: np.asarray(leaf) for path, leaf in params.items()}
            write_safetensors(folder / PARAMETERS, arrays, lambda _: None)
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")

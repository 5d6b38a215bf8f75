"""PyTorch weights to a checkpoint: every tensor is accounted for, or nothing is written."""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from sam3_jax import checkpoint
from sam3_jax.checkpoint.parts import in_parts
from sam3_jax.checkpoint.tree import flatten, unflatten
from sam3_jax.config import ModelConfig, sam3
from sam3_jax.convert import hf_names
from sam3_jax.convert.errors import ConversionError, closest, raise_problems
from sam3_jax.convert.hf_config import read_hf_config
from sam3_jax.convert.layout import Layout, find_layout, unused_in_parts
from sam3_jax.convert.progress import Progress, no_progress
from sam3_jax.convert.rows import Row, Shape, source_shape, to_params
from sam3_jax.convert.source import Source, hash_files
from sam3_jax.convert.table import CLASS_ROW, POS_EMBED
from sam3_jax.models.detector import init_shapes

PART_CHOICES = {
    "all": ("image", "tracker"),
    "image": ("image",),
    "tracker": ("tracker",),
}
HF_LAYER_NORM_EPS = 1e-6  # of the ViT in transformers' own default configuration
_FLOATS = {np.dtype(dtype) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16)}


class Matched(NamedTuple):
    """Parameters as views of the source; nothing is copied yet."""

    params: dict[str, np.ndarray]  # by path
    unused: dict[str, np.ndarray]  # by name in sam3.pt
    zero_filled: list[str]  # parameters that this kind of file lacks
    left_out: int  # tensors of parts that are not converted


class Report(NamedTuple):
    """What was converted."""

    layout: str
    parts: tuple[str, ...]
    missing_parts: tuple[str, ...]  # asked for, not in the source
    parameters: int
    unused: int
    zero_filled: tuple[str, ...]
    left_out: int


def convert(
    source: Source,
    output: str | Path,
    *,
    part: str = "all",
    config: ModelConfig | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> Report:
    """Writes the checkpoint of some weights.

    Args:
      source: opened weights (:func:`sam3_jax.convert.source.open_source`).
      output: folder to make.
      part: "all", "image" (concept prompts) or "tracker" (clicks and video).
      config: sizes of the model; None: HF's config.json if there is one, else the released ones.
      overwrite: replace a checkpoint at ``output``.
      progress: starts a progress bar for each of the two long steps.

    Raises:
      ConversionError: with all problems, when source and model do not fit together.
      CheckpointError: when the checkpoint cannot be written.
    """
    tensors = {hf_names.normal_name(name): array for name, array in source.tensors.items()}
    config = _configuration(source, tensors, config)
    layout = find_layout(tensors, config, source.name)
    held = layout.held_parts(tensors)
    parts = tuple(name for name in held if name.replace("clicks", "tracker") in PART_CHOICES[part])
    if not parts:
        raise ConversionError(
            f"{source.name}: has nothing of the part {part!r}, only {', '.join(held) or 'nothing'}"
        )
    shapes = {path: leaf.shape for path, leaf in flatten(init_shapes(config)).items()}
    matched = match(tensors, layout, shapes, parts, source.name)
    metadata = {
        "source": hash_files(source, progress("checking", source.size)),
        "layout": layout.name,
        "dtypes": sorted({str(array.dtype) for array in tensors.values()}),
        "zero_filled": matched.zero_filled,
    }
    arrays = [*matched.params.values(), *matched.unused.values()]
    total = sum(array.nbytes for array in arrays)
    checkpoint.save(
        output,
        unflatten(matched.params),
        config,
        unused=matched.unused,
        metadata=metadata,
        parts=parts,
        dtype=np.float32,
        overwrite=overwrite,
        progress=progress("writing", total),
    )
    return Report(
        layout=layout.name,
        parts=parts,
        missing_parts=tuple(name for name in PART_CHOICES[part] if name not in parts),
        parameters=sum(array.size for array in matched.params.values()),
        unused=len(matched.unused),
        zero_filled=tuple(matched.zero_filled),
        left_out=matched.left_out,
    )


def _configuration(
    source: Source, names: Collection[str], config: ModelConfig | None
) -> ModelConfig:
    """Sizes from the caller, from HF's config.json, or of the release; eps by the container."""
    config = copy.deepcopy(config) if config is not None else sam3()
    if find_layout(names, config, source.name).is_release:
        return config
    config.vision.layer_norm_eps = HF_LAYER_NORM_EPS
    if source.hf_config is None:
        return config
    file, data = source.hf_config
    return read_hf_config(data, config, str(file))


def match(
    tensors: dict[str, np.ndarray],
    layout: Layout,
    shapes: dict[str, Shape],
    parts: tuple[str, ...],
    where: str,
) -> Matched:
    """Finds the tensor of every parameter and a use for every tensor.

    Args:
      tensors: by normalised name.
      layout: the table in these names.
      shapes: of all parameters of the model, by path.
      parts: which ones are wanted.
      where: the source, for errors.

    Raises:
      ConversionError: listing every missing, unknown, mis-shaped or mis-typed tensor.
    """
    rows = [row for row in layout.rows if in_parts(row.targets[0], parts)]
    known = {row.source for row in layout.rows} | {item.source for item in layout.unused}
    known |= set(layout.copies)
    unknown = [name for name in tensors if name not in known]
    missing = [row.source for row in rows if row.source not in tensors]

    problems: list[str] = []
    params: dict[str, np.ndarray] = {}
    unused = _keep_unused(tensors, layout, parts)
    for row in rows:
        if row.source in tensors:
            array = _split_class_row(row, tensors[row.source], unused)
            problems += _fill(row, array, shapes, params)
        elif not layout.fillable(row.targets[0]):
            made = ", ".join(row.targets)
            problems.append(f"{row.source} is missing ({made}){closest(row.source, unknown)}")
    for name in unknown:
        hint = closest(name, missing)
        problems.append(f"{name} {tensors[name].shape} is no tensor of SAM 3{hint}")
    problems += _differing_copies(tensors, layout)
    wanted = [path for path in shapes if in_parts(path, parts)]
    empty = [path for path in wanted if path not in params]
    zero_filled = [path for path in empty if layout.fillable(path)]
    if not problems:
        problems += [f"nothing fills {path}" for path in empty if path not in zero_filled]
    raise_problems(where, problems)

    params |= {path: np.zeros(shapes[path], np.float32) for path in zero_filled}
    used = {row.source for row in rows} | set(layout.copies)
    used |= {item.source for item in layout.unused if item.stored in unused}
    return Matched(
        {path: params[path] for path in wanted},
        unused,
        zero_filled,
        sum(name not in used for name in tensors),
    )


def _split_class_row(row: Row, array: np.ndarray, unused: dict[str, np.ndarray]) -> np.ndarray:
    """Moves the first row of the release's position table, that of a class token, to ``unused``."""
    if row.source != POS_EMBED or array.ndim != 3:
        return array
    unused[CLASS_ROW] = array[:, :1]
    return array[:, 1:]


def _fill(
    row: Row, array: np.ndarray, shapes: dict[str, Shape], params: dict[str, np.ndarray]
) -> list[str]:
    """Puts the parameters of one row into ``params``; problems if the tensor does not fit."""
    if array.dtype not in _FLOATS:
        return [f"{row.source} is {array.dtype}; expected float32, float16 or bfloat16"]
    path, _, index = row.targets[0].removesuffix("]").partition("[")
    target_shapes = [shapes[path][1:]] if index else [shapes[target] for target in row.targets]
    expected = source_shape(row, target_shapes)
    if array.shape != expected:
        return [f"{row.source} has shape {array.shape}, the model expects {expected}"]
    arrays = to_params(row, array, target_shapes)
    if index:  # one row of a table of ours
        params.setdefault(path, np.zeros(shapes[path], np.float32))[int(index)] = arrays[0]
    else:
        params.update(zip(row.targets, arrays, strict=True))
    return []


def _keep_unused(
    tensors: dict[str, np.ndarray], layout: Layout, parts: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Tensors that nothing reads, by their names in sam3.pt."""
    return {
        item.stored: tensors[item.source].T if item.transposed else tensors[item.source]
        for item in layout.unused
        if item.source in tensors and unused_in_parts(item.stored, parts)
    }


def _differing_copies(tensors: dict[str, np.ndarray], layout: Layout) -> list[str]:
    return [
        f"{copied} differs from {original}, of which it is a copy"
        for copied, original in layout.copies.items()
        if copied in tensors
        and original in tensors
        and not np.array_equal(tensors[copied], tensors[original])
    ]

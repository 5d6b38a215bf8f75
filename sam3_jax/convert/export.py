"""A checkpoint back to PyTorch: ``sam3.pt`` or a folder for Hugging Face transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from sam3_jax.checkpoint.staging import staging_folder
from sam3_jax.checkpoint.tree import flatten
from sam3_jax.config import ModelConfig
from sam3_jax.convert.errors import ConversionError
from sam3_jax.convert.hf_config import MODEL_TYPES, write_hf_config
from sam3_jax.convert.layout import hf_layout, release_layout
from sam3_jax.convert.rows import Row, from_params
from sam3_jax.convert.safetensors_file import write_safetensors
from sam3_jax.convert.table import CLASS_ROW, POS_EMBED
from sam3_jax.convert.torch_write import write_torch

HF_LAYOUTS = tuple(MODEL_TYPES)
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"


def torch_tensors(
    params: dict, unused: dict[str, np.ndarray], config: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """Name in ``sam3.pt`` and array of every tensor, one by one; see :func:`to_torch_names`."""
    leaves = flatten(params)
    for row in release_layout(config).rows:
        arrays = _targets(row, leaves)
        if arrays is None:
            continue
        array = from_params(row, arrays)
        if row.source == POS_EMBED:
            # Upstream drops the class row unread; HF's files, having none, give zeros here.
            class_row = unused.get(CLASS_ROW, np.zeros_like(array[:, :1]))
            array = np.concatenate([class_row.astype(array.dtype), array], axis=1)
        yield row.source, array
    for name, array in unused.items():
        if name != CLASS_ROW:
            yield name, array


def to_torch_names(
    params: dict, unused: dict[str, np.ndarray], config: ModelConfig
) -> dict[str, np.ndarray]:
    """All tensors under their names in ``sam3.pt``, equal to the bit to those converted.

    Args:
      params: of any parts of the model; tensors of the others are absent.
      unused: as :func:`sam3_jax.checkpoint.load_unused` gives it.
      config: the model they belong to.
    """
    return dict(torch_tensors(params, unused, config))


def write_sam3_pt(
    path: str | Path,
    params: dict,
    unused: dict[str, np.ndarray],
    config: ModelConfig,
    *,
    overwrite: bool = False,
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Writes a file that ``torch.load`` reads, with the names of ``sam3.pt``.

    Raises:
      CheckpointError: when it exists or cannot be written.
    """
    target = Path(path).absolute()
    replace = overwrite and target.is_file()
    with staging_folder(target, total_bytes(params, unused), file=True, replace=replace) as folder:
        tensors = torch_tensors(params, unused, config)
        write_torch(folder / target.name, tensors, progress)


def to_hf_tensors(
    params: dict, unused: dict[str, np.ndarray], config: ModelConfig, layout: str
) -> dict[str, np.ndarray]:
    """All tensors under the names of one of transformers' classes, as views of the parameters.

    Raises:
      ConversionError: when the parameters lack something that the class has.
    """
    leaves = flatten(params)
    names = hf_layout(layout, config)
    tensors, missing = {}, []
    for row in names.rows:
        arrays = _targets(row, leaves)
        if arrays is None:
            missing.append(row.targets[0])
        else:
            tensors[row.source] = from_params(row, arrays)
    if missing:
        raise ConversionError(
            f"{layout} needs {len(missing)} parameters that the checkpoint lacks, such as "
            f"{missing[0]}; choose a layout of the part that it holds, or convert all parts"
        )
    for item in names.unused:
        if item.stored in unused:
            array = unused[item.stored]
            tensors[item.source] = array.T if item.transposed else array
    tensors |= {copied: tensors[original] for copied, original in names.copies.items()}
    return tensors


def write_hf(
    path: str | Path,
    params: dict,
    unused: dict[str, np.ndarray],
    config: ModelConfig,
    layout: str,
    *,
    overwrite: bool = False,
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Writes a folder that ``layout.from_pretrained`` reads: config.json and model.safetensors.

    Raises:
      ConversionError: when the parameters lack something that the class has.
      CheckpointError: when the folder exists or cannot be written.
    """
    tensors = to_hf_tensors(params, unused, config, layout)
    size = sum(array.nbytes for array in tensors.values())
    target = Path(path).absolute()
    # Replaced is only what looks like this function's own work.
    replace = overwrite and {file.name for file in target.glob("*")} == {_WEIGHTS, _CONFIG}
    with staging_folder(target, size, replace=replace) as folder:
        write_safetensors(folder / _WEIGHTS, tensors, progress)
        description = write_hf_config(config, layout)
        (folder / _CONFIG).write_text(json.dumps(description, indent=2) + "\n")


def _targets(row: Row, leaves: dict[str, np.ndarray]) -> list[np.ndarray] | None:
    """The parameters that a row's tensor is made from; None where there are not all of them."""
    arrays = []
    for target in row.targets:
        path, _, index = target.removesuffix("]").partition("[")
        if path not in leaves:
            return None
        array = np.asarray(leaves[path])
        arrays.append(array[int(index)] if index else array)
    return arrays


def total_bytes(params: dict, unused: dict[str, np.ndarray]) -> int:
    """Bytes of all arrays: what an export writes, and what its ``progress`` hears of in all."""
    return sum(array.nbytes for array in [*flatten(params).values(), *unused.values()])

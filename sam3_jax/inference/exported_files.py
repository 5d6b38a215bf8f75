"""Reads the files of an export (see ``export.py``) and checks what its programs are given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from sam3_jax.convert.errors import ConversionError
from sam3_jax.convert.safetensors_file import read_safetensors

SCHEMA_VERSION = 1
DESCRIPTION = "export.json"
PARAMETERS = "params.safetensors"
_KINDS = (jnp.floating, jnp.integer, jnp.bool_)


class ExportError(Exception):
    """An export cannot be written, read or called. The text names the file or the argument."""


def read_description(folder: Path) -> dict[str, Any]:
    file = folder / DESCRIPTION
    try:
        description = json.loads(file.read_text())
        version = description.get("schema_version")
    except FileNotFoundError:
        raise ExportError(
            f"{file}: no such file; infer.py --checkpoint DIR --export FOLDER makes an export"
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise ExportError(f"{file}: cannot be read ({error}); export again") from error
    if version != SCHEMA_VERSION:
        raise ExportError(
            f"{file}: schema version {version!r}, this program reads {SCHEMA_VERSION}; update it, "
            "or export again"
        )
    return description


def check_platform(folder: Path, platforms: Sequence[str]) -> None:
    here = jax.default_backend()
    names = {"cuda", "rocm"} if here == "gpu" else {here}
    if not names & set(platforms):
        raise ExportError(
            f"{folder}: was exported for {', '.join(platforms)} and jax runs on {here} here; "
            f"export again for it too, or set JAX_PLATFORMS={platforms[0]}"
        )


def read_program(file: Path, digest: str) -> jax_export.Exported:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ExportError(f"{file}: cannot be read ({error.strerror}); export again") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise ExportError(f"{file}: damaged or of another export; copy the folder or export again")
    try:
        return jax_export.deserialize(bytearray(data))
    except ImportError as error:
        raise ExportError("reading an export needs flatbuffers: pip install flatbuffers") from error
    except Exception as error:  # many kinds, none documented
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ExportError(
            f"{file}: this jax ({jax.__version__}) cannot read it ({reason}); export again with it"
        ) from error


def read_params(folder: Path, name: str | None) -> dict[str, np.ndarray]:
    if name is None:
        raise ExportError(f"{folder}: was exported without parameters; give params=")
    try:
        return read_safetensors(folder / name)
    except (OSError, ConversionError) as error:
        reason = str(error).splitlines()[0]
        raise ExportError(f"{folder / name}: cannot be used ({reason}); export again") from error


def fitting_params(
    folder: Path,
    params: Any,
    specs: Mapping[str, Mapping[str, Any]],
    programs: Mapping[str, jax_export.Exported],
) -> dict[str, Any]:
    """The parameters that the programs read, by path, with the shapes and dtypes they want.

    Raises:
      ExportError: when one does not fit.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    used = {}
    for program, spec in specs.items():
        # jax flattens a dictionary in the order of its keys; the other inputs follow.
        for name, aval in zip(sorted(spec["parameters"]), programs[program].in_avals, strict=False):
            leaf = flat.get(name)
            if leaf is None or leaf.shape != aval.shape or leaf.dtype != aval.dtype:
                found = "absent" if leaf is None else f"{leaf.dtype} {leaf.shape}"
                raise ExportError(
                    f"{folder}: parameter {name} is {found}, {program} needs {aval.dtype} "
                    f"{aval.shape}; use the parameters that were exported, or export again"
                )
            used[name] = leaf
    return used


def check_array(program: str, value: Mapping[str, Any], array: Any, sizes: dict[str, int]) -> Any:
    """``array`` with the dtype that an input has; ``sizes`` collects the symbolic ones."""
    name, dtype = value["name"], jnp.dtype(value["dtype"])
    array = array if isinstance(array, jax.Array) else np.asarray(array)
    shape = tuple(value["shape"])
    known = ", ".join(f"{symbol} = {size}" for symbol, size in sizes.items() if symbol in shape)
    wanted = tuple(
        sizes.setdefault(n, size) if isinstance(n, str) else n
        for n, size in zip(shape, array.shape, strict=False)
    )
    if array.ndim != len(shape) or array.shape != wanted or 0 in array.shape:
        text = f"({', '.join(map(str, shape))}){f' with {known}' if known else ''}"
        raise ExportError(f"{program}: {name} must have shape {text}, got {array.shape}")
    kinds = [kind for kind in _KINDS if jnp.issubdtype(dtype, kind)]
    if not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
        raise ExportError(f"{program}: {name} must be {dtype}, got {array.dtype}")
    return array.astype(dtype)

"""Saves and loads the parameters of a model: Orbax arrays and a ``config.json`` beside them.

A checkpoint is a folder::

    config.json   what the parameters are: format, architecture, parts, configuration, origin
    params/       the parameters (Orbax, uncompressed)
    unused/       tensors of the release that nothing reads, kept to be written back
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from sam3_jax import config as config_lib
from sam3_jax.config import ModelConfig

FORMAT_VERSION = 1
ARCHITECTURES = ("sam3",)
CONFIG = "config.json"
GROUP_BYTES = 256 * 2**20  # written at a time, which bounds the memory that saving takes
# Read at a time: left to itself, Orbax reads all at once, which takes half as much memory again
# and, for the pages it touches, twice the time.
READ_BYTES = 512 * 2**20

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h

# Parts of the model that a checkpoint may hold, and the parameters of each (path prefixes).
# "image" finds concepts, "tracker" follows objects, "clicks" is the tracker without its memory.
_BACKBONE = ("vision/trunk/", "vision/tracker_neck/")
_DETECTOR = "text geometry fusion decoder scoring segmentation".split()
PARTS: dict[str, tuple[str, ...]] = {
    "image": ("vision/trunk/", "vision/detector_neck/", *(f"{name}/" for name in _DETECTOR)),
    "tracker": (*_BACKBONE, "tracker/"),
    "clicks": (
        *_BACKBONE,
        "tracker/prompt_encoder/",
        "tracker/mask_decoder/",
        "tracker/no_memory_embed/",
    ),
}
WHOLE = ("image", "tracker")

# Parameters of which nothing but their rounding to the compute dtype is ever used.
_COMPUTE_ONLY = re.compile(r"^(vision|text)/.*/kernel$")

# Field of the configuration, a parameter (or a numbered module), and which of its axes has that
# size (None: how many there are; for the hypernetworks one more).
_SIZES: tuple[tuple[str, str, int | None], ...] = (
    ("vision.patch_size", "vision/trunk/patch_embed/kernel", 0),
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


class CheckpointError(Exception):
    """A checkpoint cannot be read or written. The text names the file and what to do."""


class Loaded(NamedTuple):
    """What :func:`load` gives."""

    params: dict  # nested; NumPy arrays, or jax ones where shardings were given
    config: ModelConfig
    metadata: dict[str, Any]  # origin, as `save` was given it, with "parts"


def in_parts(path: str, parts: Iterable[str]) -> bool:
    """Whether a parameter (its path joined by "/") belongs to one of the parts."""
    return any(path.startswith(PARTS[part]) for part in parts)


def flatten(tree: dict) -> dict[str, Any]:
    """Leaves of nested dictionaries by their path, joined by "/"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(leaves: dict[str, Any]) -> dict:
    """Inverse of :func:`flatten`."""
    tree: dict = {}
    for path, leaf in leaves.items():
        *folders, last = path.split("/")
        node = tree
        for name in folders:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def save(
    path: str | os.PathLike,
    params: dict,
    config: ModelConfig,
    *,
    unused: dict[str, np.ndarray] | None = None,
    metadata: dict[str, Any] | None = None,
    parts: Sequence[str] = WHOLE,
    dtype: Any = None,
    overwrite: bool = False,
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Writes a checkpoint, all of it or nothing.

    Needs little memory beside the arrays themselves, which may be views of mapped files. Where jax
    runs in several processes all of them must call this, with the same arrays and a shared folder.

    Args:
      path: folder to make.
      params: nested dictionary of arrays (NumPy, or jax that this process can address).
      config: the model they belong to.
      unused: further arrays by name, stored as they are.
      metadata: anything JSON can hold about their origin.
      parts: which of :data:`PARTS` the parameters make up.
      dtype: what the parameters are cast to; None keeps them.
      overwrite: replace a checkpoint that is there; anything else is never replaced.
      progress: called with the number of bytes after each group of arrays.

    Raises:
      CheckpointError: when the folder is taken, the disk is full, or writing fails.
    """
    target = Path(path).absolute()
    cast = np.dtype(dtype) if dtype is not None else None
    leaves, kept = flatten(params), dict(unused or {})
    need = sum(leaf.size * (cast or leaf.dtype).itemsize for leaf in leaves.values())
    need += sum(leaf.nbytes for leaf in kept.values())
    description = {
        "format_version": FORMAT_VERSION,
        "arch": config.arch,
        "parts": list(parts),
        "model": config_lib.to_dict(config),
        "metadata": metadata or {},
    }
    replace = overwrite and is_checkpoint(target)

    def write(folder: Path) -> None:
        _meet()
        _write_arrays(folder / "params", leaves, cast, progress)
        if kept:
            _write_arrays(folder / "unused", kept, None, progress)
        _meet()

    if jax.process_index():  # the first process makes the folder and puts it in its place
        write(_staging_name(target))
        return
    with staging_folder(target, need, replace=replace) as folder:
        write(folder)
        (folder / CONFIG).write_text(json.dumps(description, indent=2) + "\n")


def _meet() -> None:
    """Waits for all processes: Orbax wants them to write together."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("sam3_jax checkpoint")


def _staging_name(target: Path) -> Path:
    """Where a checkpoint is written first; processes that write together agree on it."""
    mark = os.getpid() if jax.process_count() == 1 else "shared"
    return target.with_name(f".{target.name}.{mark}.partial")


@contextlib.contextmanager
def staging_folder(
    target: Path, need: int, *, file: bool = False, replace: bool = False
) -> Iterator[Path]:
    """A folder beside ``target`` that takes its place if all goes well, and vanishes if not.

    Args:
      target: must not exist or be an empty folder, unless it is to be replaced.
      need: bytes that will be written.
      file: the target is the file of its name in the folder, not the folder.
      replace: what is there goes away, after the new one is complete.

    Raises:
      CheckpointError: when the place is taken, the disk is too small, or writing fails.
    """
    taken = target.exists() and (file or not target.is_dir() or any(target.iterdir()))
    if taken and not replace:
        raise CheckpointError(f"{target}: exists already; choose another output or remove it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise CheckpointError(f"{target.parent}: cannot be written to ({error})") from error
    if free < need:
        raise CheckpointError(
            f"{target}: needs {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are free on that disk; "
            "free some space or choose an output on another disk"
        )
    folder = _staging_name(target)
    try:
        folder.mkdir()
        yield folder
        _put_in_place(folder / target.name if file else folder, target)
    except (OSError, ValueError, RuntimeError) as error:  # tensorstore has its own for a full disk
        raise CheckpointError(
            f"{target}: writing failed, nothing was kept: {_first_line(error)}"
        ) from error
    finally:
        _remove(folder)


def _put_in_place(new: Path, target: Path) -> None:
    if not target.exists() or target.is_file():
        os.replace(new, target)
        return
    old = new.with_name(f"{new.name}.old")  # a folder only replaces an empty one
    os.replace(target, old)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old)


def _remove(folder: Path) -> None:
    """Removes a folder that threads of a failed write may still be adding files to."""
    for _ in range(20):
        if not folder.exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:400]


def _write_arrays(
    folder: Path,
    leaves: dict[str, Any],
    dtype: np.dtype | None,
    progress: Callable[[int], object],
) -> None:
    """Writes arrays group by group into one Orbax checkpoint."""
    context = ocp.Context()
    context.array.saving.use_compression = False  # weights hardly shrink, and loading takes longer
    context.memory.deepcopy_host_arrays = False
    with context:
        for group in _groups(leaves):
            arrays = {
                name: np.asarray(leaf, dtype or leaf.dtype, order="C")
                for name, leaf in group.items()
            }
            ocp.partial.save(folder, unflatten(arrays))
            progress(sum(leaf.nbytes for leaf in group.values()))
        ocp.partial.finalize(folder)


def _groups(leaves: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Neighbouring leaves, about GROUP_BYTES together."""
    group: dict[str, Any] = {}
    size = 0
    for name, leaf in leaves.items():
        if group and size + leaf.nbytes > GROUP_BYTES:
            yield group
            group, size = {}, 0
        group[name] = leaf
        size += leaf.nbytes
    if group:
        yield group


def load(
    path: str | os.PathLike,
    *,
    dtype: Any = None,
    parts: Sequence[str] | None = None,
    shardings: Callable[[dict], dict] | None = None,
) -> Loaded:
    """Reads a checkpoint.

    Args:
      path: folder that :func:`save` or ``convert_torch_weights.py`` wrote.
      dtype: what the backbones' matrices, nine tenths of all, are cast to while reading: the
        compute dtype, in which they are multiplied anyway. The rest, which takes part in float32
        arithmetic, keeps its precision. None casts nothing.
      parts: which of :data:`PARTS` to read; None reads all there are.
      shardings: from the tree of shapes to the tree of shardings, to read each device's share
        straight onto it (``functools.partial(param_shardings, mesh=mesh)``); None gives NumPy
        arrays.

    Raises:
      CheckpointError: when there is no usable checkpoint, or it lacks one of ``parts``.
    """
    folder = Path(path).absolute()
    description = _read_description(folder)
    config = _read_model(folder, description)
    held = list(description["parts"])
    for part in parts or ():
        if part not in held and not (part == "clicks" and "tracker" in held):
            raise CheckpointError(
                f"{folder}: has no {part!r} part, only {', '.join(held)}; convert the full weights "
                "again with --part all"
            )
    with _reading(folder / "params"):
        stored = flatten(ocp.metadata(folder / "params").metadata)
    _check_sizes(folder, config, {name: leaf.shape for name, leaf in stored.items()})
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, np.dtype(load_dtype(name, leaf, dtype)))
        for name, leaf in stored.items()
        if in_parts(name, parts or held)
    }
    if shardings is None:
        # What Orbax takes for "a NumPy array like this": one that occupies no memory.
        like = {n: np.broadcast_to(np.zeros((), s.dtype), s.shape) for n, s in wanted.items()}
    else:
        places = flatten(shardings(unflatten(wanted)))
        like = {
            name: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=places[name])
            for name, shape in wanted.items()
        }
    largest = max((leaf.size * leaf.dtype.itemsize for leaf in wanted.values()), default=0)
    with _returning_memory():
        params = _read_arrays(folder / "params", unflatten(like), max(READ_BYTES, largest))
    metadata = {**description.get("metadata", {}), "parts": list(parts or held)}
    return Loaded(params, config, metadata)


@contextlib.contextmanager
def _returning_memory() -> Iterator[None]:
    """Tells glibc to give large blocks back when they are freed, and afterwards all it can.

    By itself it learns from the first large blocks to keep them: reading 3.4 GB of weights left a
    heap with 0.7 GB of holes. The setting stays for the whole process; elsewhere nothing happens.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 2**20)
    except (OSError, AttributeError):
        libc = None
    yield
    if libc:
        libc.malloc_trim(0)


def load_dtype(name: str, leaf: Any, dtype: Any) -> Any:
    """The dtype that :func:`load` gives one parameter."""
    return dtype if dtype is not None and _COMPUTE_ONLY.search(name) else leaf.dtype


def load_unused(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Tensors of the release that nothing reads, by their names there; maybe none.

    Raises:
      CheckpointError: when there is no usable checkpoint.
    """
    folder = Path(path).absolute()
    _read_description(folder)
    if not (folder / "unused").is_dir():
        return {}
    return _read_arrays(folder / "unused", None, None)


def is_checkpoint(path: str | os.PathLike) -> bool:
    """Whether a folder looks like one that :func:`save` wrote."""
    try:
        return "format_version" in json.loads((Path(path) / CONFIG).read_text())
    except (OSError, ValueError, TypeError):
        return False


def _read_arrays(folder: Path, like: dict | None, at_once: int | None) -> dict:
    """Reads what ``like`` names (None: everything), at most ``at_once`` bytes at a time."""
    context = ocp.Context()
    context.memory.read_concurrent_bytes = at_once
    context.pytree.loading.partial_load = True
    with _reading(folder), context:
        return ocp.load(folder, like)


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Turns whatever Orbax and tensorstore raise on damaged files into a CheckpointError."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # many kinds, none documented
        raise CheckpointError(
            f"{folder}: damaged or incomplete, convert the weights again or copy the folder again "
            f"({_first_line(error)})"
        ) from error


def _read_description(folder: Path) -> dict[str, Any]:
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


def _read_model(folder: Path, description: dict[str, Any]) -> ModelConfig:
    model = description.get("model")
    try:
        if not isinstance(model, dict):
            raise ValueError(f"model: expected an object, got {model!r}")
        return config_lib.from_dict(model, where="model")
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}; correct it or convert again") from error


def _check_sizes(folder: Path, config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises where config.json is not about these parameters, naming every field that differs."""
    problems = []
    for field, path, axis in _SIZES:
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

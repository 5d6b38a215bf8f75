"""Checkpoints on disk: parameters in Orbax format beside a ``config.json``.

A checkpoint is a folder: ``config.json`` (format version, model configuration, parts, where the
weights came from), ``params/GROUP`` for each top-level group of parameters (``vision``, ``text``,
``decoder``, ...) and ``unused`` for tensors of the converted file that no code reads. Groups are
written one after another, so that a converter needs never hold more than one of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from sam3_jax import config as model_config
from sam3_jax.config import ModelConfig
from sam3_jax.models.detector import init_shapes

FORMAT_VERSION = 1
CONFIG = "config.json"
PARTS = ("image", "tracker", "clicks")

Tree = dict[str, Any]


class CheckpointError(Exception):
    """A checkpoint that cannot be read or written; the message says what to do."""


class Loaded(NamedTuple):
    """``params``: nested dictionary of jax arrays. ``metadata``: ``config.json`` less the model."""

    params: Tree
    config: ModelConfig
    metadata: dict[str, Any]


def flatten(tree: Tree) -> dict[str, Any]:
    """Nested dictionaries to {"a/b/c": leaf}."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(k, simple=True, separator="/"): leaf for k, leaf in leaves}


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """Inverse of :func:`flatten`."""
    tree: Tree = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def in_part(path: str, part: str) -> bool:
    """Whether a parameter belongs to a part of the model.

    ``image``: finds concepts. ``tracker``: everything of the tracker. ``clicks``: the tracker less
    its video memory, which is all that segmenting one image by points needs.
    """
    if path.startswith("vision/trunk/"):
        return True
    if path.startswith("vision/tracker_neck/"):
        return part != "image"
    if path.startswith("tracker/"):
        heads = ("tracker/prompt_encoder/", "tracker/mask_decoder/", "tracker/no_memory_embed")
        return part == "tracker" or (part == "clicks" and path.startswith(heads))
    return part == "image"


def part_shapes(config: ModelConfig, parts: Iterable[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """Flat path -> shape of all parameters of the parts."""
    parts = tuple(parts)
    shapes = flatten(init_shapes(config))
    return {p: s for p, s in shapes.items() if any(in_part(p, part) for part in parts)}


def _context() -> ocp.Context:
    context = ocp.Context()
    saving = context.array.saving
    saving.use_compression = False  # weights do not compress; loading is twice as fast without
    saving.enable_post_merge_validation = False
    context.memory.deepcopy_host_arrays = False  # arrays are not changed while they are written
    return context


def check_writable(path: str | os.PathLike, overwrite: bool = False) -> None:
    """Raises CheckpointError unless a checkpoint may be written to ``path``."""
    path = Path(path)
    if not os.path.lexists(path):
        return
    if path.is_dir() and not any(path.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"{path} exists; choose another output or pass --overwrite")
    if not (path / CONFIG).is_file():
        raise CheckpointError(
            f"{path} exists and is not a checkpoint of sam3_jax, so it is not replaced; "
            "delete it yourself or choose another output"
        )
    _read_config(path)  # never replace a stranger's folder that has a config.json


def save(
    path: str | os.PathLike,
    params: Mapping[str, Tree | Callable[[], Tree]],
    config: ModelConfig,
    *,
    parts: Iterable[str] = ("image", "tracker"),
    unused: Mapping[str, np.ndarray] | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Writes a checkpoint; whatever goes wrong, ``path`` is what it was before.

    Args:
      path: folder to make.
      params: parameters by top-level group; a group may be a function that makes it when its
        turn comes.
      config: the model's configuration.
      parts: what ``params`` holds: of "image", "tracker", "clicks".
      unused: tensors to keep beside the parameters, by name.
      metadata: more entries for ``config.json``.
      overwrite: replace a checkpoint that is there.
      progress: show a progress bar on stderr.

    Raises:
      CheckpointError: ``path`` exists, or the disk refuses.
    """
    path = Path(os.path.abspath(path))
    check_writable(path, overwrite)
    parts = tuple(parts)
    expected = part_shapes(config, parts)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        total = 4 * sum(s.size for s in expected.values())
        with _progress_bar(partial, total, progress), _context():
            for group, tree in params.items():
                tree = tree() if callable(tree) else tree
                _check_group(path, group, tree, expected)
                _write_item(partial / "params" / group, tree)
            if unused:
                _write_item(partial / "unused", dict(unused))
        described = {
            "format_version": FORMAT_VERSION,
            "arch": config.arch,
            "parts": list(parts),
            "model": model_config.to_dict(config),
            **(metadata or {}),
        }
        (partial / CONFIG).write_text(json.dumps(described, indent=2) + "\n")
        _move(partial, path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) or "No space left" in str(error):
            raise CheckpointError(
                f"{path} could not be written, and nothing is left of it: {error}. A checkpoint "
                "of the released size needs 3.5 GB of disk"
            ) from error
        raise


def _check_group(path: Path, group: str, tree: Tree, expected: Mapping[str, Any]) -> None:
    found = {p: np.shape(leaf) for p, leaf in flatten({group: tree}).items()}
    wanted = {p: s.shape for p, s in expected.items() if p.startswith(group + "/")}
    if found != wanted:
        raise CheckpointError(f"{path}: {_differences(found, wanted)}")


def _write_item(path: Path, tree: Tree) -> None:
    ocp.save(path, tree, checkpointable_name="arrays")


def _move(partial: Path, path: Path) -> None:
    """Puts the finished folder in place; an older one goes away only after that."""
    if not path.exists():
        partial.rename(path)
        return
    old = partial.with_name(partial.name + "-old")
    path.rename(old)
    try:
        partial.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old)


@contextlib.contextmanager
def _progress_bar(folder: Path, total: int, show: bool) -> Iterator[None]:
    """Shows how many of ``total`` bytes have arrived in ``folder``."""
    if not show:
        yield
        return
    stop = threading.Event()
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="writing")

    def watch() -> None:
        while not stop.wait(0.2):
            bar.update(min(_folder_bytes(folder), total) - bar.n)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
        bar.total = max(_folder_bytes(folder), 1)
        bar.update(bar.total - bar.n)
    finally:
        stop.set()
        thread.join()
        bar.close()


def _folder_bytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # renamed between listing and asking
                total += os.stat(os.path.join(root, name)).st_size
    return total


def load(
    path: str | os.PathLike,
    *,
    dtype: Any = None,
    parts: Iterable[str] | None = None,
    shardings: Callable[[Tree], Tree] | None = None,
) -> Loaded:
    """Reads a checkpoint into jax arrays.

    Args:
      path: folder that ``convert_torch_weights.py`` or :func:`save` wrote.
      dtype: of the backbones' matrices, for example ``jnp.bfloat16`` to halve their memory; all
        other parameters are float32 in any case.
      parts: of "image", "tracker", "clicks"; default all that the checkpoint has.
      shardings: function from the tree of shapes to a tree of shardings, for example
        ``functools.partial(param_shardings, mesh=mesh)``; default: one device.

    Raises:
      CheckpointError: there is no usable checkpoint, or not with these parts.
    """
    path = Path(os.path.abspath(path))
    config, metadata = _read_config(path)
    stored = part_shapes(config, metadata["parts"])
    if parts is None:
        wanted = stored
    else:
        _check_parts(path, tuple(parts), metadata["parts"])
        wanted = part_shapes(config, parts)
    tree = unflatten({p: _leaf_struct(p, shape, dtype) for p, shape in wanted.items()})
    if shardings is None:
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placed = jax.tree.map(lambda _: one, tree)
    else:
        placed = shardings(tree)
    tree = jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), tree, placed
    )
    groups: dict[str, dict] = {}
    for name, shape in stored.items():
        groups.setdefault(name.split("/")[0], {})[name] = shape.shape
    params = {}
    for group, subtree in tree.items():
        params[group] = _read_group(path, group, subtree, groups[group])
    return Loaded(params, config, metadata)


def load_unused(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Tensors that were stored beside the parameters, verbatim; none gives {}.

    Raises:
      CheckpointError: as :func:`load`.
    """
    path = Path(os.path.abspath(path))
    _read_config(path)
    if not (path / "unused").exists():
        return {}
    with _damage(path, "unused"), _context():
        found = ocp.load(path / "unused", checkpointable_name="arrays")
        return {name: np.asarray(array) for name, array in found.items()}


def _leaf_struct(path: str, shape: jax.ShapeDtypeStruct, dtype: Any) -> jax.ShapeDtypeStruct:
    big = path.startswith(("vision/", "text/")) and path.endswith("/kernel")
    return jax.ShapeDtypeStruct(shape.shape, dtype if big and dtype is not None else shape.dtype)


def _check_parts(path: Path, wanted: tuple[str, ...], stored: list[str]) -> None:
    for part in wanted:
        if part not in PARTS:
            raise ValueError(f"unknown part {part!r}: choose of {', '.join(PARTS)}")
        if part not in stored and not (part == "clicks" and "tracker" in stored):
            raise CheckpointError(
                f"{path} holds {' and '.join(stored)}, not {part}: convert the file with "
                f"--part {'all' if part == 'image' else 'tracker'}, from a source that has it"
            )


def _read_group(path: Path, group: str, tree: Tree, stored: Mapping[str, tuple]) -> Tree:
    """One group's arrays; ``stored``: the shapes that the configuration says are there."""
    item = path / "params" / group
    with _damage(path, f"params/{group}"), _context() as context:
        tree_metadata = ocp.metadata(item, checkpointable_name="arrays").metadata
        found = {p: tuple(a.shape) for p, a in flatten({group: tree_metadata}).items()}
        if found != dict(stored):
            raise CheckpointError(
                f"{path}: {CONFIG} does not fit the parameters: "
                f"{_differences(found, stored)}. Restore {CONFIG} or convert the weights again"
            )
        context.pytree.loading.partial_load = True
        return ocp.load(item, tree, checkpointable_name="arrays")


@contextlib.contextmanager
def _damage(path: Path, item: str) -> Iterator[None]:
    """Turns whatever Orbax and TensorStore raise on broken files into our error."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{path}: {item} is damaged or incomplete ({reason[0][:300] if reason else error!r}); "
            "copy the checkpoint or convert the weights again"
        ) from error


def _differences(found: Mapping[str, tuple], wanted: Mapping[str, tuple]) -> str:
    """The first few entries that differ, in words."""
    lines = [f"{p} is missing" for p in wanted if p not in found]
    lines += [f"{p} is unknown" for p in found if p not in wanted]
    lines += [
        f"{p} has shape {found[p]} instead of {wanted[p]}"
        for p in wanted
        if p in found and found[p] != wanted[p]
    ]
    more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
    return "; ".join(lines[:5]) + more


def _read_config(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Configuration and the other entries of ``config.json``."""
    remedy = "give the folder that convert_torch_weights.py wrote"
    file = path / CONFIG
    if not path.is_dir():
        problem = "is a file, not a folder" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {problem}; {remedy}")
    try:
        data = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} has no {CONFIG}; {remedy}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; {remedy}") from error
    if not isinstance(data, dict) or "format_version" not in data:
        hint = "; it looks like a Hugging Face model" if "model_type" in data else ""
        raise CheckpointError(
            f"{path} is no checkpoint of sam3_jax{hint}: convert it with convert_torch_weights.py"
        )
    if data["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: format_version {data['format_version']!r} is unknown to this version of "
            f"sam3_jax, which reads {FORMAT_VERSION}; update sam3_jax"
        )
    arch, parts = data.get("arch"), data.get("parts")
    if arch != "sam3":
        raise CheckpointError(f"{file}: arch {arch!r} is not supported; this is for 'sam3'")
    if not isinstance(parts, list) or not parts or not set(map(str, parts)) <= set(PARTS):
        raise CheckpointError(f"{file}: parts is {parts!r}, not a list of {', '.join(PARTS)}")
    try:
        config = model_config.from_dict(data.pop("model", None), where="model")
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}; convert the weights again") from error
    return config, data

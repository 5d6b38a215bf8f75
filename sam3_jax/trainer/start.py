"""What a run starts from: its data set, its model, the parameters before the first step."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from sam3_jax import checkpoint
from sam3_jax.checkpoint import PARTS
from sam3_jax.config import ModelConfig
from sam3_jax.data.builder import Source, digest_of, prepare
from sam3_jax.models.detector import init_params, init_shapes
from sam3_jax.sharding import on_one_device, param_shardings
from sam3_jax.trainer.config import InitConfig, SplitConfig, TrainConfig
from sam3_jax.training.init_from import copy_within, fill_within, init_from, scale_within


class RunError(Exception):
    """A run cannot start or go on. The text says why and what to do."""


class Origin(NamedTuple):
    """Parameters before the first step; what their checkpoint had beside them."""

    params: dict  # float32
    model: ModelConfig
    unused: dict[str, Any]  # tensors of the release that nothing reads, to be written back
    metadata: dict[str, Any]


def source_of(split: SplitConfig) -> Source:
    """A split's files."""
    return Source(Path(split.annotations), Path(split.images) if split.images else None)


def prepare_data(config: TrainConfig) -> Path:
    """The folder of the training pictures' records; process 0 writes it, unless it is there.

    ``config.data.folder`` names one that ``sam3_jax.data.builder.prepare`` wrote before.

    Raises:
      RunError: neither annotations nor a folder.
      AnnotationError: unusable files, or too many unusable entries.
    """
    if config.data.folder:
        return Path(config.data.folder)
    if not config.train.annotations:
        raise RunError(
            "no training data: give --config.train.annotations=FILE (COCO or SA-Co JSON, or a "
            "Roboflow folder) and, where they are elsewhere, --config.train.images=FOLDER"
        )
    return written_data(config, digest_of, prepare, "train")


def written_data(
    config: TrainConfig,
    digest: Callable[[Source], str],
    write: Callable[..., Path],
    kind: str,
) -> Path:
    """The folder of the data of ``config.train``, or ``config.data.folder``; see ``prepare_data``.

    Args:
      digest: identifies the split's files.
      write: as ``sam3_jax.data.builder.prepare``.
      kind: of the data, the beginning of the folder's name.
    """
    if config.data.folder:
        return Path(config.data.folder)
    if not config.train.annotations:
        raise RunError(
            "no training data: give --config.train.annotations=FILE (YouTube-VIS JSON, or a folder "
            "in SA-V's layout) and, where they are elsewhere, --config.train.images=FOLDER"
        )
    source = source_of(config.train)
    # Named by its contents: another annotation file is another data set.
    name = f"{kind}-{digest(source).split()[0][:12]}"
    folder = Path(config.output).absolute() / "data"
    if jax.process_index() == 0:
        print(f"data: {config.train.annotations} into {folder / name}", file=sys.stderr)
        write({"train": source}, folder, name, max_bad=config.train.max_bad)
    barrier("data")
    return write({"train": source}, folder, name, max_bad=config.train.max_bad)


def barrier(name: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def training_model(wanted: ModelConfig, sizes: ModelConfig, resolution: int) -> ModelConfig:
    """The model of ``sizes``; what belongs to training (dropout, remat, scan ...) as wanted.

    Raises:
      RunError: on a resolution that is not a multiple of the patch size.
    """
    model = copy.deepcopy(sizes)
    model.image_size = resolution
    patch = model.vision.patch_size
    if resolution % patch:
        raise RunError(
            f"the pictures' resolution={resolution} must be a multiple of {patch}, best of "
            f"{patch * model.vision.window_size}"
        )
    for part in ("vision", "text", "geometry", "fusion", "decoder", "scoring", "memory"):
        for name in ("drop_path", "dropout", "remat", "scan"):
            if hasattr(getattr(model, part), name):
                setattr(getattr(model, part), name, getattr(getattr(wanted, part), name))
    return model


def initial(
    init: InitConfig, wanted: ModelConfig, resolution: int, seed: int, mesh: Mesh | None
) -> Origin:
    """Random parameters, or those of a checkpoint, or some of each, spread over ``mesh``.

    Raises:
      CheckpointError: no usable checkpoint.
      RunError: parameters that do not fit the model.
    """
    origin = _origin(init, wanted, resolution, seed, mesh)
    try:
        params = copy_within(origin.params, init.copies)
        params = fill_within(scale_within(params, init.scales), init.fills)
        return origin._replace(params=params)
    except ValueError as error:
        raise RunError(f"init: {error}") from error


def _origin(
    init: InitConfig, wanted: ModelConfig, resolution: int, seed: int, mesh: Mesh | None
) -> Origin:
    place = functools.partial(param_shardings, mesh=mesh) if mesh else on_one_device
    if not init.checkpoint:
        model = training_model(wanted, wanted, resolution)
        return Origin(_random(model, seed, place), model, {}, {"source": "random values"})
    loaded = checkpoint.load(init.checkpoint, shardings=place)
    prefixes = tuple(init.prefixes)
    whole = prefixes == ("",)
    # A part of another model keeps the sizes of the configuration, a whole model brings its own.
    model = training_model(wanted, loaded.config if whole else wanted, resolution)
    metadata = {"source": f"trained from {init.checkpoint}", "origin": loaded.metadata}
    shapes = init_shapes(model)
    same = jax.tree.structure(shapes) == jax.tree.structure(loaded.params)
    if whole and same:
        return Origin(loaded.params, model, checkpoint.load_unused(init.checkpoint), metadata)
    if whole:
        held = loaded.metadata["parts"]
        prefixes = tuple(dict.fromkeys(prefix for part in held for prefix in PARTS[part]))
        print(
            f"note: {init.checkpoint} holds only {', '.join(held)}; all else starts at random",
            file=sys.stderr,
        )
    try:
        params = init_from(_random(model, seed, place), loaded.params, prefixes)
    except ValueError as error:
        raise RunError(f"{init.checkpoint}: {error}") from error
    return Origin(params, model, {}, metadata)


def _random(model: ModelConfig, seed: int, place: Any) -> dict:
    make = functools.partial(init_params, model)
    key = jax.random.key(seed)
    shardings = place(jax.eval_shape(make, key))
    # Hundreds of small draws: XLA would spend a minute of a core on making them quick.
    on_cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    return jax.jit(make, out_shardings=shardings, compiler_options=options)(key)

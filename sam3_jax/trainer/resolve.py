"""What the settings of a run come to: its steps, this process's data, the devices, FLOPs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
from jax.sharding import Mesh

from sam3_jax.data.pipeline import DataConfig, num_exemplars
from sam3_jax.sharding import make_mesh
from sam3_jax.trainer.config import TrainConfig
from sam3_jax.trainer.flops import train_flops
from sam3_jax.trainer.start import RunError


def with_steps(config: TrainConfig, pictures: int) -> TrainConfig:
    """The configuration with epochs of so many pictures as steps.

    Raises:
      RunError: on less than one.
    """
    steps = config.steps
    if config.epochs:
        steps = int(config.epochs * pictures / config.batch_size)
    if steps < 1:
        raise RunError(f"nothing to do: {config.epochs} epochs of {pictures} pictures, or steps=0")
    return dataclasses.replace(config, steps=steps, epochs=0.0)


def data_config(config: TrainConfig, folder: Path) -> DataConfig:
    """The pipeline of this process.

    Raises:
      RunError: where the processes cannot share a batch evenly.
    """
    share = _share(config)
    example = dataclasses.replace(config.data.example)
    if config.clicks.weight and not example.clicks:
        raise RunError(
            "clicks.weight trains the interactive head: say on how many objects an image with "
            "data.example.clicks, or set the weight to 0"
        )
    if (config.loss.masks or config.loss.semantic) and not example.mask_size:
        raise RunError(
            "the loss compares masks: give data.example.mask_size (288 is the model's own), or set "
            "loss.masks and loss.semantic to False"
        )
    buckets = tuple(config.data.buckets)
    if jax.process_count() > 1:
        buckets = buckets[-1:]  # one program for all: nobody knows what the others' batches need
    return dataclasses.replace(
        config.data,
        folder=str(folder),
        batch_size=share,
        seed=config.data.seed + config.seed,
        context_length=config.model.text.context_length,
        buckets=buckets,
        example=example,
    )


def clip_data_config(config: TrainConfig, folder: Path) -> DataConfig:
    """The pipeline of this process, of clips.

    Raises:
      RunError: where the processes cannot share a batch evenly.
    """
    return dataclasses.replace(
        config.data,
        folder=str(folder),
        batch_size=_share(config),
        seed=config.data.seed + config.seed,
    )


def _share(config: TrainConfig) -> int:
    """Images, or clips, of a batch that this process makes."""
    processes = jax.process_count()
    if config.batch_size % processes:
        raise RunError(f"batch_size={config.batch_size} cannot be shared by {processes} processes")
    return config.batch_size // processes


def make_run_mesh(config: TrainConfig) -> Mesh | None:
    """All devices, or None for one.

    Raises:
      RunError: where they cannot share a batch evenly.
    """
    sizes = config.mesh
    try:
        mesh = make_mesh(sizes.data or None, sizes.tensor, fsdp=sizes.fsdp)
    except ValueError as error:
        raise RunError(f"config.mesh: {error}") from error
    shards = mesh.shape["data"] * mesh.shape.get("fsdp", 1)
    micro = config.batch_size / config.step.accumulate
    if micro % shards:
        raise RunError(
            f"batch_size={config.batch_size} in {config.step.accumulate} micro-batches cannot be "
            f"split over {shards} devices (data x fsdp): choose a multiple of "
            f"{shards * config.step.accumulate}, or give the mesh a larger tensor axis"
        )
    return mesh if mesh.size > 1 else None


def flops_per_step(config: TrainConfig, data: DataConfig) -> float:
    """Model FLOPs of a step."""
    return train_flops(
        config.model,
        config.batch_size,
        config.batch_size * data.example.sampling.phrases,
        tokens=data.context_length,
        boxes=num_exemplars(data),
        loss=config.loss,
        clicks=config.clicks,
        objects=data.example.clicks,
    )

"""AdamW as the released recipe runs it (upstream ``sam3/train/optim/``, ``sam3/train/configs``).

The chain, in this order:

1. clip by the global norm of what trains,
2. ``scale_by_adam``,
3. decoupled weight decay, not of biases and LayerNorms,
4. the rate of the parameter's group times its layer decay,
5. the schedule, which multiplies all rates alike (1 at its top), and the sign.

What is frozen never gets here: the step differentiates only what :func:`split` leaves, so frozen
parameters cost no gradient and no moments, and are no part of the norm (as in torch, where they
have no gradient). Freezing by zeroed updates would pay for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

# Not parameters, but random numbers that a checkpoint has to keep (upstream: a buffer).
CONSTANTS = (r"^tracker/prompt_encoder/gaussian$",)
# Parts that the detector's loss does not reach. They must be frozen unless another loss trains
# them: where gradients are zero, weight decay alone would wear them away.
TRACKER = (r"^tracker/", r"^vision/tracker_neck/")
# Of these, what the interactive head's loss does not reach either.
MEMORY = (r"^tracker/(mask_downsample|memory_\w+|no_object_\w+|pointer_\w+)/",)
# What no loss of the head or the tracker reaches: all in front of their neck, and the detector.
IMAGE_MODEL = (
    r"^vision/(trunk|detector_neck)/",
    r"^(text|geometry|fusion|decoder|scoring|segmentation)/",
)
# Scales of norms that decay. The released recipe exempts ``torch.nn.LayerNorm`` by class, which
# neither GroupNorm nor SAM's ``LayerNorm2d`` is.
DECAYED_NORMS = (
    r"^segmentation/norm_\d+/scale$",
    r"^tracker/mask_decoder/upscale_norm/scale$",
    r"^tracker/prompt_encoder/mask_norm_\d+/scale$",
    r"^tracker/memory_encoder/(mask_downsampler/norm_\d+|block_\d+/norm)/scale$",
)


@dataclass
class GroupConfig:
    """Parameters whose path matches ``pattern`` train at ``rate``.

    ``layer_decay``: factor for every layer below the last of the vision trunk; its position table
    is exempt.
    """

    pattern: str
    rate: float
    layer_decay: float = 1.0


@dataclass
class ScheduleConfig:
    """Course of the rates over the steps; see :func:`make_schedule`."""

    kind: str = "inverse_sqrt"  # or "cosine"
    warmup: int = 20
    cooldown: int = 20  # of "inverse_sqrt"
    timescale: int = 20  # of "inverse_sqrt", in steps
    final: float = 0.0  # of "cosine": where it ends, as a share of its top


@dataclass
class OptimizerConfig:
    """Constants of the optimizer; the defaults are the released fine-tuning recipe's."""

    vision: GroupConfig = field(default_factory=lambda: GroupConfig(r"^vision/", 2.5e-4, 0.9))
    text: GroupConfig = field(default_factory=lambda: GroupConfig(r"^text/", 5e-5))
    rest: GroupConfig = field(
        default_factory=lambda: GroupConfig(
            r"^(geometry|fusion|decoder|scoring|segmentation|tracker)/", 8e-4
        )
    )
    rate_scale: float = 0.1  # on all rates
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    weight_decay: float = 0.1
    decayed_norms: tuple[str, ...] = DECAYED_NORMS
    clip: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    freeze: tuple[str, ...] = ()  # paths (regular expressions) that do not train
    ema: float = 0.0  # decay of the average of the parameters; 0: none


def finetuning() -> OptimizerConfig:
    """The released recipe (``configs/roboflow_v100/roboflow_v100_full_ft_100_images.yaml``)."""
    return OptimizerConfig()


def pretraining() -> OptimizerConfig:
    """The paper's stage 2; stage 3 is this with ``rate_scale`` .025.

    The paper names the reciprocal square root and 5000 steps each of warm-up and cool-down, but no
    timescale: it is the warm-up here, as in the released recipe. Clip and weight decay are that
    recipe's too.
    """
    config = OptimizerConfig(rate_scale=1.0)
    config.vision.rate, config.text.rate, config.rest.rate = 5e-4, 1e-4, 1e-3
    config.schedule = ScheduleConfig(warmup=5000, cooldown=5000, timescale=5000)
    return config


def tracking() -> OptimizerConfig:
    """The paper's stage 4: a cosine from 5e-4, one rate for all that trains.

    The warm-up, clip and weight decay are not in the paper.
    """
    config = OptimizerConfig(rate_scale=1.0)
    config.vision.rate = config.rest.rate = 5e-4
    config.vision.layer_decay = 1.0
    config.schedule = ScheduleConfig("cosine", warmup=1000)
    return config


class Optimizer(NamedTuple):
    """What the step needs. ``schedule``: the common factor of all rates, by optimizer steps."""

    transform: optax.GradientTransformation
    schedule: Callable[[Int[Array, ""]], Float[Array, ""]]
    frozen: tuple[str, ...]
    ema: float


def make_schedule(config: ScheduleConfig, total: int) -> optax.Schedule:
    """Factor of the rates at a step, counted from 0, of ``total`` steps.

    "inverse_sqrt" (upstream ``schedulers.py``): 1 / sqrt((step + timescale - warmup) / timescale)
    after the warm-up, times the linear ramps of warm-up and cool-down. The first step of a warm-up
    has a rate of 0, as upstream.

    Raises:
      ValueError: on another kind, or ramps that do not fit.
    """
    if config.kind not in ("inverse_sqrt", "cosine"):
        raise ValueError(f"schedule kind {config.kind!r}: choose inverse_sqrt or cosine")
    ramps = config.warmup + (config.cooldown if config.kind == "inverse_sqrt" else 0)
    if ramps > total:
        raise ValueError(
            f"warm-up and cool-down take {ramps} steps, there are {total}: shorten "
            "schedule.warmup and schedule.cooldown, or train longer"
        )
    if config.kind == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0 if config.warmup else 1.0, 1.0, config.warmup, total, config.final
        )

    def factor(step: Int[Array, ""]) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        past = jnp.maximum(step - config.warmup, 0.0)
        value = jax.lax.rsqrt(past / config.timescale + 1.0)
        value *= jnp.minimum(1.0, step / config.warmup) if config.warmup else 1.0
        if config.cooldown:
            value *= jnp.clip((total - step) / config.cooldown, 0.0, 1.0)
        return value

    return factor


def make_optimizer(config: OptimizerConfig, *, depth: int, total: int) -> Optimizer:
    """The chain of the module's docstring.

    Args:
      depth: blocks of the vision trunk.
      total: optimizer steps of the run.
    """
    schedule = make_schedule(config.schedule, total)
    transform = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, lambda tree: decay_mask(config, tree)),
        _scale_by_path(config, depth),
        optax.scale_by_learning_rate(schedule),
    )
    return Optimizer(transform, schedule, (*config.freeze, *CONSTANTS), config.ema)


def path_of(path: tuple) -> str:
    """Path of a leaf, joined by "/"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def decays(config: OptimizerConfig, path: str) -> bool:
    """Whether weight decay applies: everything but biases and the scales of LayerNorms."""
    if path.endswith("/scale"):
        return any(re.search(pattern, path) for pattern in config.decayed_norms)
    return not path.endswith("/bias")


def decay_mask(config: OptimizerConfig, tree: PyTree) -> PyTree[bool]:
    """:func:`decays` of every leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, _: decays(config, path_of(path)), tree)


def rate_of(config: OptimizerConfig, path: str, depth: int) -> float:
    """Rate of a parameter at the schedule's top: its group's times its layer decay.

    Upstream ``layer_decay_param_modifier`` and ``ViT.get_layer_id``: what lies before the blocks of
    the trunk counts as a layer below the first, what lies behind the trunk does not decay.

    Raises:
      ValueError: where not exactly one group has the parameter.
    """
    groups = {"vision": config.vision, "text": config.text, "rest": config.rest}
    found = [name for name, group in groups.items() if re.search(group.pattern, path)]
    if len(found) != 1:
        raise ValueError(
            f"parameter {path} is in {len(found)} groups ({', '.join(found) or 'none'}) instead of "
            f"one: change the patterns of the optimizer's groups, {', '.join(groups)}"
        )
    group = groups[found[0]]
    rate = group.rate * config.rate_scale
    if not path.startswith("vision/trunk/") or path.endswith("trunk/pos_embed"):
        return rate
    block = re.match(r"vision/trunk/block_(\d+)/", path)
    layer = int(block[1]) + 1 if block else 0
    return rate * group.layer_decay ** (depth + 1 - layer)


def _scale_by_path(config: OptimizerConfig, depth: int) -> optax.GradientTransformation:
    def scale(path: tuple, update: Array) -> Array:
        return rate_of(config, path_of(path), depth) * update

    def init(params: PyTree) -> optax.EmptyState:
        jax.tree_util.tree_map_with_path(
            lambda path, _: rate_of(config, path_of(path), depth), params
        )
        return optax.EmptyState()

    def update(updates: PyTree, state: optax.EmptyState, params: PyTree | None = None):
        del params
        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(init, update)


def split(params: dict, frozen: Sequence[str]) -> tuple[dict, dict]:
    """Nested parameters as (those that train, those whose path a pattern of ``frozen`` finds)."""
    parts: tuple[dict, dict] = ({}, {})
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = path_of(path)
        node = parts[any(re.search(pattern, name) for pattern in frozen)]
        *folders, last = name.split("/")
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return parts


def join(first: dict, second: dict) -> dict:
    """Inverse of :func:`split`."""
    both = first.keys() & second.keys()
    return {**first, **second, **{name: join(first[name], second[name]) for name in both}}

"""Arithmetic of the model and peaks of devices: what model FLOPs utilisation (MFU) is made of.

As in PaLM (arXiv 2204.02311, appendix B) a step's model FLOPs are three times the forward pass's,
two for each multiplication with its addition, and only matrix products and convolutions count. What
remat computes again does not, nor do losses, matcher and optimizer: so the figure compares programs
that do the same work in other ways. MFU = model FLOPs a second / the devices' dense bfloat16 peak.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import AbstractMesh

from sam3_jax.config import ModelConfig
from sam3_jax.models.detector import Sam3, empty_click, empty_geometry, init_shapes
from sam3_jax.ops.attention import portable
from sam3_jax.training.batch import Clicks, TrainBatch
from sam3_jax.training.clicks import ClickConfig
from sam3_jax.training.step import forward
from sam3_jax.training.targets import LossConfig, Targets
from sam3_jax.types import ClickOutput, Levels

# jax's device_kind (a pattern; the first that is found) -> FLOPs a second in bfloat16 with float32
# accumulation, without sparsity, by the makers' data sheets. One jax device is a chip; of TPU7x,
# which has no megacore, it is half of one.
PEAKS: tuple[tuple[str, float | None], ...] = (
    (r"MIG", None),  # a slice of a GPU
    (r"^TPU v4$", 275e12),
    (r"^TPU (v5 lite|v5e)$", 197e12),
    (r"^TPU (v5|v5p)$", 459e12),
    (r"^TPU (v6 lite|v6e)$", 918e12),
    (r"^TPU7x$", 1153.5e12),
    (r"A100", 312e12),
    (r"A10G", 70e12),
    (r"A10\b", 125e12),
    (r"RTX A6000", 155e12),
    (r"H100 PCIe", 756e12),
    (r"H[12]00 NVL", 835e12),
    (r"\b(H100|H200|GH200)\b", 989e12),
    (r"\bB200\b", 2250e12),
    (r"\bL4\b", 121e12),
    (r"\bL40\b", 181e12),
    (r"\bL40S\b", 362e12),
    (r"RTX 3090$", 71e12),
    (r"RTX 4090$", 165e12),
    (r"RTX 5090$", 209e12),
)
# Kernels whose arithmetic their equation does not show.
OPAQUE = re.compile(r"pallas_call|dot_product_attention|custom_call|ffi_call")


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOPs a second of a ``jax.Device.device_kind``; None where it is not known."""
    return next((peak for pattern, peak in PEAKS if re.search(pattern, device_kind)), None)


def train_flops(
    model: ModelConfig,
    images: int,
    prompts: int,
    *,
    tokens: int = 32,
    boxes: int = 0,
    loss: LossConfig | None = None,
    clicks: ClickConfig | None = None,
    objects: int = 0,
) -> float:
    """Model FLOPs of a step: forward, and twice as much backward; see :func:`forward_flops`.

    An upper bound where parts are frozen: their weights need no gradient, and where nothing in
    front of them trains either, neither do their inputs.
    """
    return 3.0 * forward_flops(
        model,
        images,
        prompts,
        tokens=tokens,
        boxes=boxes,
        loss=loss,
        clicks=clicks,
        objects=objects,
    )


def forward_flops(
    model: ModelConfig,
    images: int,
    prompts: int,
    *,
    tokens: int = 32,
    boxes: int = 0,
    loss: LossConfig | None = None,
    clicks: ClickConfig | None = None,
    objects: int = 0,
) -> float:
    """FLOPs of a batch's forward pass in training, whatever kernels and meshes compute it.

    Tracing the released size takes about 10 s of one core.

    Args:
      images: of the batch, ``model.image_size`` pixels a side.
      prompts: of the batch, as many for each image.
      tokens: of each phrase, padding included.
      boxes: exemplar slots of each prompt.
      loss: heads that it does not read do not run. Default: all run.
      clicks: where its weight is not 0, every round of a click session counts as well.
      objects: of each image, that are clicked on.
    """
    loss = loss or LossConfig()
    rounds = clicks.corrections + 1 if clicks is not None and clicks.weight else 0
    alone = rounds > 0 and clicks.alone
    module = Sam3(model, jnp.bfloat16)
    batch = _batch(model, images, prompts, tokens, boxes, objects)

    def detect(params: dict, batch: TrainBatch) -> tuple[tuple, Levels | None]:
        key = jax.random.key(0)
        got = forward(module, params, batch, key, detector=not alone, tracker=rounds > 0)
        out, levels = got.detector, got.tracker
        if out is None:
            return (), levels
        heads = (out.layer_logits, out.layer_boxes, out.layer_presence)
        heads += (out.pred_masks,) * loss.masks + (out.semantic_seg,) * loss.semantic
        return heads, levels

    def click(params: dict, levels: Levels) -> ClickOutput:
        side = 4 * (model.image_size // model.vision.patch_size)
        prompt = empty_click(images * objects, 1 + rounds, (side, side))
        return module.apply({"params": params}, levels, prompt, None, method="click")

    params = init_shapes(model)
    total, (_, levels) = count_flops(detect, params, batch)
    if rounds:
        total += rounds * count_flops(click, params, levels)[0]
    return total


def _batch(
    model: ModelConfig, images: int, prompts: int, tokens: int, boxes: int, objects: int
) -> TrainBatch:
    """Shapes of a batch; the forward pass does not look at targets, so there are none."""

    def make() -> TrainBatch:
        yes, none = jnp.ones(prompts, bool), jnp.zeros((prompts, 0), bool)
        mask = jnp.zeros((prompts, 0, 0), bool)
        return TrainBatch(
            jnp.zeros((images, model.image_size, model.image_size, 3), jnp.uint8),
            jnp.zeros((prompts, tokens), jnp.int32),
            empty_geometry(prompts, boxes=boxes),
            Targets(jnp.zeros((prompts, 0, 4)), none, mask[..., None], none, mask, yes, yes),
            Clicks(
                jnp.zeros((images, objects, 2, 2)),
                jnp.zeros((images, objects, 2), jnp.int32),
                jnp.zeros((images, objects, 0, 0), bool),
                jnp.zeros((images, objects), bool),
            ),
        )

    return jax.eval_shape(make)


def count_flops(f: Callable, *args: object) -> tuple[float, object]:
    """FLOPs of what ``f`` does for its outputs, and their shapes. Nothing is computed.

    Attention is traced as plain matrix products, outside of any mesh.

    Raises:
      ValueError: where the program has a loop of unknown length, or a kernel, that may compute.
    """
    # The kernels' arithmetic is the same as that of plain attention, but cannot be seen.
    with portable(), jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        closed, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
    used, _ = dce_jaxpr(closed.jaxpr, used_outputs=True)
    return _flops(used), shapes


def _flops(jaxpr: Jaxpr) -> float:
    return math.fsum(map(_equation_flops, jaxpr.eqns))


def _equation_flops(eqn: JaxprEqn) -> float:
    """FLOPs of one equation, with all that it calls: jit, remat, custom derivatives, loops."""
    name = eqn.primitive.name
    if name == "dot_general":
        ((contracted, _), _), shape = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
        return 2.0 * eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * eqn.outvars[0].aval.size * kernel.size / features
    if OPAQUE.search(name):
        raise ValueError(f"the arithmetic of the kernel {name} cannot be counted: trace without it")
    inner = [_flops(jaxpr) for jaxpr in jaxprs_in_params(eqn.params)]
    if name == "cond":  # the branches of a choice between platforms do the same
        return max(inner)
    if name == "while" and sum(inner):
        raise ValueError("a while loop computes: its length is not known; use scan or fori_loop")
    times = 1.0
    if name == "scan":
        times *= eqn.params["length"]
    elif name == "shard_map":  # seen from inside, which is one device's share
        axes = eqn.params.get(
            "newly_manual_axes", eqn.params.get("manual_axes")
        )  # by jax's version
        times *= math.prod(eqn.params["mesh"].shape[axis] for axis in axes)
    return times * math.fsum(inner)

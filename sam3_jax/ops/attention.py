"""Scaled dot-product attention: one function, the right kernel for every platform and shape.

Stands for ``F.scaled_dot_product_attention``, which all of upstream's attention calls
(``sam3/model/vitdet.py``, ``model_misc.py``, ``sam/transformer.py``). What "auto" gives:

========  ==========================================  =============================================
platform  condition                                   kernel
========  ==========================================  =============================================
TPU       bfloat16, no bias, no dropout               Pallas splash attention
CUDA      16 bits, head size % 8 == 0 and <= 128      cuDNN flash attention; a key mask becomes
          (Hopper: 256, as memory attention has; on   lengths, or part of the bias if there is one
          newer GPUs not tried), no dropout, not
          causal with a key mask
GPU, TPU  everything else (float32, training with     ``chunked``: tiles of at most 576 queries and
          dropout, larger heads, a bias on a TPU)     256 MB of scores, in XLA
CPU       always, in float32 inside                   ``chunked``: tiles that fit the cache
========  ==========================================  =============================================

Up to ``FLASH_SCORES`` scores a head (text, prompts, queries among themselves) TPU and CUDA use
``chunked`` as well, which then is one plain softmax. The choice falls when a program is lowered, so
ahead-of-time compilation for another platform gets that platform's kernel. Programs traced under
:func:`portable` take "chunked" everywhere.

Under ``jax.set_mesh`` the kernels run inside ``shard_map``, batch over ``BATCH_AXES`` and heads
over ``HEAD_AXIS``: a Pallas call cannot be partitioned automatically. Axes that do not divide the
batch or the heads are left whole.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Bool, Float

from sam3_jax.ops import chunked_attention as tiled
from sam3_jax.ops import flash
from sam3_jax.ops.chunked_attention import Operands

IMPLEMENTATIONS = ("auto", "naive", "chunked", "cudnn", "splash")
BATCH_AXES = ("data", "fsdp")
HEAD_AXIS = "tensor"

# Scores of one head from which a flash kernel pays: 512 x 512. Below are 5184 image tokens on up to
# 50 prompt tokens and 401 decoder queries among themselves; windows of 576 x 576 are above.
FLASH_SCORES = 1 << 18

_PORTABLE = contextvars.ContextVar("portable", default=False)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Programs traced inside take "chunked" for "auto": plain XLA, the same on every platform.

    What was traced (and cached by ``jax.jit``) before stays as it is.
    """
    token = _PORTABLE.set(True)
    try:
        yield
    finally:
        _PORTABLE.reset(token)


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    *,
    bias: Float[Array, "#b #h n m"] | None = None,
    key_mask: Bool[Array, "b m"] | None = None,
    causal: bool = False,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    implementation: str = "auto",
) -> Float[Array, "b n h d"]:
    """softmax(q k / sqrt(d) + bias) v, with the softmax in float32 and the result in q's dtype.

    float32 inputs are multiplied in float32 on every platform, 16-bit inputs with float32
    accumulation.

    Args:
      bias: added to the scaled scores.
      key_mask: True = valid. Rows without a valid key give zeros.
      causal: query i sees keys 0..i.
      dropout_rate: share of the attention weights that is dropped; needs ``dropout_rng``. The
        weights dropped do not depend on a mesh, but on the platform's tiles.
      implementation: "auto"; "naive" (one matrix of scores, a reference); "chunked"; "cudnn";
        "splash" (interpreted, and slow, off TPU).

    Raises:
      ValueError: for an unknown implementation, one that cannot do what is asked, inputs of
        different dtypes, or dropout without a key.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: choose one of {IMPLEMENTATIONS}")
    if implementation == "auto" and _PORTABLE.get():
        implementation = "chunked"
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: cast them to one dtype")
    if dropout_rate and dropout_rng is None:
        raise ValueError(f"dropout_rate={dropout_rate} needs dropout_rng, a jax.random key")
    keys = None
    if dropout_rate:
        if not jnp.issubdtype(dropout_rng.dtype, jax.dtypes.prng_key):
            dropout_rng = jax.random.wrap_key_data(dropout_rng)
        keys = jax.random.split(dropout_rng, (q.shape[0], q.shape[2]))
    x = Operands(q, k, v, bias, key_mask, keys)
    if implementation in ("cudnn", "splash"):
        reason = _refusal(implementation, x, causal)
        if reason:
            raise ValueError(f'implementation="{implementation}" {reason}; use "auto"')
    return _attention(x, causal=causal, rate=float(dropout_rate), implementation=implementation)


def _refusal(kernel: str, x: Operands, causal: bool) -> str | None:
    """Why ``kernel`` cannot compute this; None if it can."""
    bits, d = 8 * x.q.dtype.itemsize, x.q.shape[-1]
    if x.keys is not None:
        return "has no dropout"
    if kernel == "splash" and x.bias is not None:
        return "takes no bias"
    if kernel == "cudnn":
        if bits != 16:
            return f"takes 16-bit inputs, not {x.q.dtype}"
        if d % 8 or d > flash.cudnn_head_limit():
            limit = flash.cudnn_head_limit()
            return f"takes head sizes that are multiples of 8 up to {limit} here, not {d}"
        if causal and x.key_mask is not None:
            return "takes no key mask with causal"
    return None


# jit, so that the many layers of a model that call it alike are traced once.
@functools.partial(jax.jit, static_argnames=("causal", "rate", "implementation"))
def _attention(
    x: Operands, *, causal: bool, rate: float, implementation: str
) -> Float[Array, "b n h d"]:
    """Splits the work over the mesh in whose context it is traced."""
    f = functools.partial(_on_device, causal=causal, rate=rate, implementation=implementation)
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    free = [axis for axis, kind in kinds if kind == AxisType.Auto]
    # Axes of size 1 as well: Mosaic wants every axis of the mesh to be manual.
    if all(mesh.shape[axis] == 1 for axis in free):
        return f(x)
    b, _, h, _ = x.q.shape
    batch, size = [], 1
    for axis in BATCH_AXES:
        if axis in free and b % (size * mesh.shape[axis]) == 0:
            batch, size = [*batch, axis], size * mesh.shape[axis]
    rows = tuple(batch) or None
    heads = HEAD_AXIS if HEAD_AXIS in free and h % mesh.shape[HEAD_AXIS] == 0 else None
    tokens, bias = PartitionSpec(rows, None, heads), None
    if x.bias is not None:
        bias = PartitionSpec(
            rows if x.bias.shape[0] > 1 else None, heads if x.bias.shape[1] > 1 else None
        )
    specs = Operands(
        *(tokens, tokens, tokens, bias),
        key_mask=None if x.key_mask is None else PartitionSpec(rows),
        keys=None if x.keys is None else PartitionSpec(rows, heads),
    )
    # check_vma: Pallas calls do not say over which axes their results vary.
    return jax.shard_map(
        f, in_specs=(specs,), out_specs=tokens, axis_names=set(free), check_vma=False
    )(x)


def _on_device(
    x: Operands, *, causal: bool, rate: float, implementation: str
) -> Float[Array, "b n h d"]:
    """Chooses the kernel of a shard, for the platform that the program is lowered for."""

    def chunked(tiles: tiled.Tiles) -> functools.partial:
        return functools.partial(tiled.chunked, causal=causal, rate=rate, tiles=tiles)

    def on_cpu(x: Operands) -> Array:
        # XLA multiplies 16-bit matrices at half the speed of float32 on CPUs without such units.
        wide = x._replace(**{name: getattr(x, name).astype(jnp.float32) for name in "qkv"})
        return chunked(tiled.CPU_TILES)(wide).astype(x.q.dtype)

    cudnn = functools.partial(flash.cudnn, causal=causal)
    splash = functools.partial(flash.splash, causal=causal, interpret=False)
    if implementation == "naive":
        return chunked(tiled.NO_TILES)(x)
    if implementation == "cudnn":
        return cudnn(x)
    if implementation == "splash":
        interpreted = functools.partial(flash.splash, causal=causal, interpret=True)
        return lax.platform_dependent(x, tpu=splash, default=interpreted)
    kernels = {"cpu": on_cpu}
    if implementation == "auto" and x.q.shape[1] * x.k.shape[1] > FLASH_SCORES:
        if _refusal("cudnn", x, causal) is None and _has_cudnn():
            kernels["cuda"] = cudnn
        if _refusal("splash", x, causal) is None and x.q.dtype == jnp.bfloat16:
            kernels["tpu"] = splash
    return lax.platform_dependent(x, **kernels, default=chunked(tiled.DEVICE_TILES))


@functools.cache
def _has_cudnn() -> bool:
    """Whether jax's CUDA plugin is installed: without it cuDNN's call cannot even be traced."""
    x = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.bfloat16)
    try:
        jax.eval_shape(
            functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), x, x, x
        )
    except RuntimeError:
        return False
    return True

"""2-D convolution, channels last, fast on CPUs too: depthwise ones, and gradients of kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

from sam3_jax.ops.attention import BATCH_AXES

Precision = lax.Precision | None
PLACES = 2048  # of a gradient's maps that are worked on at a time, in whole images
UNROLLED = 16  # elements of a kernel whose gradients are written out; more compile for too long


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def conv2d(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c_group d"],
    stride: int = 1,
    pad: int = 0,
    groups: int = 1,
    precision: Precision = None,
) -> Float[Array, "b h2 w2 d"]:
    """Convolution with ``pad`` zeros on every side; kernel HWIO."""
    return _conv(x, kernel, stride, pad, groups, precision)


def _conv(
    x: Array, kernel: Array, stride: int, pad: int, groups: int, precision: Precision
) -> Array:
    native = functools.partial(
        lax.conv_general_dilated,
        window_strides=(stride, stride),
        padding=[(pad, pad)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision=precision,
    )
    if stride > 1 or not _is_depthwise(x, kernel, groups):
        return native(x, kernel)
    # XLA's own on a CPU takes twenty to forty times as long.
    shifted = functools.partial(_shifted_products, pad=pad)
    return lax.platform_dependent(x, kernel, cpu=shifted, default=native)


def _is_depthwise(x: Array, kernel: Array, groups: int) -> bool:
    return groups == kernel.shape[3] == x.shape[3] > 1


def _shifted_products(x: Array, kernel: Array, *, pad: int) -> Array:
    """A depthwise convolution of stride 1: the sum over the kernel's elements, in one loop."""
    height, width = kernel.shape[:2]
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0))).astype(jnp.float32)
    kernel = kernel.astype(jnp.float32)
    rows, columns = (
        n + 2 * pad - k + 1 for n, k in zip(x.shape[1:3], (height, width), strict=True)
    )
    parts = (
        padded[:, i : i + rows, j : j + columns] * kernel[i, j, 0]
        for i in range(height)
        for j in range(width)
    )
    return functools.reduce(jnp.add, parts).astype(x.dtype)


def _forward(
    x: Array, kernel: Array, stride: int, pad: int, groups: int, precision: Precision
) -> tuple[Array, tuple[Array, Array]]:
    return _conv(x, kernel, stride, pad, groups, precision), (x, kernel)


def _backward(
    stride: int, pad: int, groups: int, precision: Precision, saved: tuple, dy: Array
) -> tuple[Array, Array]:
    x, kernel = saved

    def by_convolution(x: Array, kernel: Array, dy: Array) -> Array:
        conv = functools.partial(
            _conv, x, stride=stride, pad=pad, groups=groups, precision=precision
        )
        return jax.vjp(conv, kernel)[1](dy)[0]

    def by_products(x: Array, kernel: Array, dy: Array) -> Array:
        gradient = _depthwise_gradient if depthwise else _kernel_gradient
        return gradient(x, kernel, dy, stride, pad, precision)

    depthwise = _is_depthwise(x, kernel, groups)
    size = kernel.shape[0]
    if depthwise and stride == 1 and size == kernel.shape[1] and pad < size:
        dx = _conv(dy, kernel[::-1, ::-1], 1, size - 1 - pad, groups, precision)
    else:
        conv = functools.partial(
            _conv, kernel=kernel, stride=stride, pad=pad, groups=groups, precision=precision
        )
        dx = jax.vjp(conv, x)[1](dy)[0]
    if groups > 1 and not depthwise:
        return dx, by_convolution(x, kernel, dy)
    # XLA takes it for a convolution with a window as large as the map: a tenth of the speed, and of
    # depthwise ones in a loop, which it makes dense, a hundredth.
    on_cpu = _on_each_device(by_products, len(x))
    return dx, lax.platform_dependent(x, kernel, dy, cpu=on_cpu, default=by_convolution)


def _on_each_device(gradient: Callable, images: int) -> Callable:
    """Under a mesh, the sum over devices of each one's gradient of its own images.

    One image at a time would otherwise be fetched from the device that has it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    free = [axis for axis, kind in kinds if kind == AxisType.Auto and mesh.shape[axis] > 1]
    if not free:
        return gradient
    rows: tuple[str, ...] = ()
    for axis in BATCH_AXES:
        if axis in free and images % math.prod(mesh.shape[a] for a in (*rows, axis)) == 0:
            rows = (*rows, axis)

    def summed(x: Array, kernel: Array, dy: Array) -> Array:
        return lax.psum(gradient(x, kernel, dy), rows) if rows else gradient(x, kernel, dy)

    split, whole = PartitionSpec(rows or None), PartitionSpec()
    return jax.shard_map(
        summed,
        in_specs=(split, whole, split),
        out_specs=whole,
        axis_names=set(free),
        check_vma=False,
    )


def _kernel_gradient(
    x: Array, kernel: Array, dy: Array, stride: int, pad: int, precision: Precision
) -> Array:
    """A product of matrices for each row of the kernel, whose columns lie side by side.

    A few images at a time, to stay in the cache.
    """
    height, width, channels, features = kernel.shape
    rows, columns = (stride * (n - 1) + 1 for n in dy.shape[1:3])
    at_once = max(1, PLACES // (dy.shape[1] * dy.shape[2]))
    at_once = max(n for n in range(1, at_once + 1) if len(x) % n == 0)

    def add(total: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        x, dy = pair
        x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        x = jnp.concatenate([x[:, :, j : j + columns : stride] for j in range(width)], axis=-1)
        seen = [x[:, i : i + rows : stride].reshape(-1, width * channels) for i in range(height)]
        product = functools.partial(
            jnp.dot, precision=precision, preferred_element_type=jnp.float32
        )
        return total + jnp.stack([product(s.T, dy.reshape(-1, features)) for s in seen]), None

    total = jnp.zeros((height, width * channels, features), jnp.float32)
    groups = (y.reshape(-1, at_once, *y.shape[1:]) for y in (x, dy))
    total, _ = lax.scan(add, total, tuple(groups))
    return total.reshape(kernel.shape).astype(kernel.dtype)


def _depthwise_gradient(
    x: Array, kernel: Array, dy: Array, stride: int, pad: int, precision: Precision
) -> Array:
    """A product of maps, channel by channel, for each element of the kernel.

    One image at a time, to stay in the cache.
    """
    height, width = kernel.shape[:2]
    rows, columns = (stride * (n - 1) + 1 for n in dy.shape[1:3])

    def part(x: Array, dy: Array, row: Array | int, column: Array | int) -> Array:
        seen = lax.dynamic_slice(x, (row, column, 0), (rows, columns, x.shape[2]))
        return jnp.einsum(
            "hwc,hwc->c",
            seen[::stride, ::stride],
            dy,
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    def add(total: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        x, dy = pair
        x = jnp.pad(x, ((pad, pad), (pad, pad), (0, 0)))
        places = [(i, j) for i in range(height) for j in range(width)]
        if len(places) > UNROLLED:
            parts = lax.map(lambda place: part(x, dy, *place), jnp.array(places))
        else:
            parts = jnp.stack([part(x, dy, *place) for place in places])
        return total + parts.reshape(total.shape), None

    total, _ = lax.scan(add, jnp.zeros(kernel.shape, jnp.float32), (x, dy))
    return total.astype(kernel.dtype)


conv2d.defvjp(_forward, _backward)

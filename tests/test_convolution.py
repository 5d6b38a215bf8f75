"""Convolution and its gradients against PyTorch's."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sam3_jax.ops import convolution
from sam3_jax.ops.convolution import conv2d
from sam3_jax.sharding import batch_sharding, make_mesh

# Size, stride, padding, groups, channels out; the last ones are depthwise, one of them with more
# padding than its elements reach.
CASES = [(3, 1, 1, 1, 12), (3, 2, 1, 1, 12), (4, 4, 0, 1, 12), (1, 1, 0, 1, 12), (7, 1, 3, 6, 12)]
CASES += [(7, 1, 3, 6, 6), (3, 1, 0, 6, 6), (3, 2, 1, 6, 6), (3, 1, 3, 6, 6)]


@pytest.mark.parametrize(("size", "stride", "pad", "groups", "out"), CASES)
def test_value_and_gradients(size: int, stride: int, pad: int, groups: int, out: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 12, 8, 6)).astype(np.float32)
    kernel = rng.standard_normal((size, size, 6 // groups, out)).astype(np.float32)
    weight = torch.from_numpy(kernel.transpose(3, 2, 0, 1)).requires_grad_()
    image = torch.from_numpy(x.transpose(0, 3, 1, 2)).requires_grad_()
    y = torch.nn.functional.conv2d(image, weight, stride=stride, padding=pad, groups=groups)
    dy = rng.standard_normal(y.shape).astype(np.float32)
    y.backward(torch.from_numpy(dy))

    def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return conv2d(x, kernel, stride, pad, groups, jax.lax.Precision.HIGHEST)

    value, back = jax.vjp(conv, jnp.asarray(x), jnp.asarray(kernel))
    dx, dkernel = back(jnp.asarray(dy.transpose(0, 2, 3, 1)))
    # float32 sums of at most 300 products of order 1.
    for ours, theirs in [
        (value, y.detach().numpy().transpose(0, 2, 3, 1)),
        (dx, image.grad.numpy().transpose(0, 2, 3, 1)),
        (dkernel, weight.grad.numpy().transpose(2, 3, 1, 0)),
    ]:
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("places", [1, 130, 200, 1000])
def test_kernel_gradient_by_groups_of_images(places, monkeypatch):
    """Of six images of 64 places, so many at once as fit and divide them: 1, 2, 3, all."""
    monkeypatch.setattr(convolution, "PLACES", places)
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal((6, 8, 8, c)), jnp.float32) for c in (3, 5))
    kernel = jnp.zeros((3, 3, 3, 5))

    def gradient(conv: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return jax.vjp(conv, kernel)[1](dy)[0]

    expected = gradient(
        lambda kernel: jax.lax.conv_general_dilated(
            x, kernel, (1, 1), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    )
    found = gradient(lambda kernel: conv2d(x, kernel, 1, 1))
    np.testing.assert_allclose(found, expected, atol=1e-4)  # another order of summing


@pytest.mark.parametrize(("images", "split"), [(8, True), (6, True), (5, False)])
def test_gradients_on_a_mesh(images: int, *, split: bool) -> None:
    """Each device sums over its own images; five cannot be split."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal((images, 8, 8, 4)), jnp.float32) for _ in range(2))
    kernel = jnp.asarray(rng.standard_normal((3, 3, 4, 4)), jnp.float32)

    def gradients(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vjp(lambda *args: conv2d(*args, 1, 1), x, kernel)[1](dy)

    expected = gradients(x, kernel, dy)
    with jax.set_mesh(mesh):
        if images % 4 == 0:
            x, dy = jax.device_put((x, dy), batch_sharding(mesh))
        program = jax.jit(gradients).lower(x, kernel, dy).compile()
        found = program(x, kernel, dy)
    assert ("all-reduce" in program.as_text()) == split
    for ours, reference in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, reference, atol=1e-4)  # another order of summing

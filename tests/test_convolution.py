"""Convolution and its gradients against PyTorch's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sam3_jax.ops.convolution import conv2d

CASES = [(3, 1, 1, 1), (3, 2, 1, 1), (4, 4, 0, 1), (1, 1, 0, 1), (7, 1, 3, 6)]


@pytest.mark.parametrize(("size", "stride", "pad", "groups"), CASES)
def test_value_and_gradients(size: int, stride: int, pad: int, groups: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 12, 8, 6)).astype(np.float32)
    kernel = rng.standard_normal((size, size, 6 // groups, 12)).astype(np.float32)
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

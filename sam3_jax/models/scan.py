"""Equal blocks as one loop: a program as long as one block, instead of as long as all of them.

XLA's time and memory grow with a program's length, for TPUs beyond what a machine has when all
blocks of a training step are written out. The parameters stay as they are named, one subtree a
block; they are stacked inside the program, so their gradients come back one subtree a block too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree, Shaped


def stack_blocks(blocks: Sequence[PyTree], groups: int | None = None) -> PyTree:
    """Trees of one structure to one tree whose leaves have a leading axis, the blocks.

    ``groups``: two axes, (groups, blocks of a group).
    """

    def stack(*leaves: Shaped[Array | np.ndarray, "..."]) -> Array:
        stacked = jnp.stack(leaves)
        return stacked if groups is None else stacked.reshape(groups, -1, *stacked.shape[1:])

    return jax.tree.map(stack, *blocks)


def scan_blocks(
    block: Callable[[Shaped[Array, "..."], PyTree], Shaped[Array, "..."]],
    x: Shaped[Array, "..."],
    blocks: PyTree,
    *,
    remat: bool,
) -> Shaped[Array, "..."]:
    """``x`` through all blocks, one after the other.

    Args:
      block: (x, entry of ``blocks``) -> x, of the same shape and dtype.
      blocks: what differs between them (parameters, rates, keys), on a leading axis.
      remat: compute each block again in the backward pass.
    """
    if remat:
        # Forward and backward are loops of their own: there is nothing that XLA could share.
        block = jax.checkpoint(block, prevent_cse=False)
    return lax.scan(lambda x, entry: (block(x, entry), None), x, blocks)[0]

"""LoRA (Hu et al., arXiv 2106.09685) as a transformation of the parameter tree.

``W + alpha / rank * A B`` for any ``Linear`` of the models (``sam3_jax/models/layers.py``), whose
kernel may have several input or output axes. The models know nothing of it: the loss merges first,
so gradients reach A and B through the merged kernels, and an export is a merge too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

# The only linear layer with a kernel of four axes, as convolutions have: it flattens 7 x 7 maps.
_FLATTENS_MAPS = "geometry/box_pool"


@dataclass
class LoraConfig:
    """``patterns``: regular expressions of module paths, such as "vision/trunk/.*/attn/[qkv]$".

    Rank 0: no LoRA.
    """

    rank: int = 0
    alpha: float = 16.0
    patterns: tuple[str, ...] = (r"attn/(q|k|v|out)$",)


def input_axes(module: str, shape: tuple[int, ...]) -> int:
    """Leading axes of a ``Linear``'s kernel that are inputs; 0 for convolutions.

    ``out`` of an attention reads (heads, head size), q, k and v write it.
    """
    if len(shape) == 2:
        return 1
    if len(shape) == 3:
        return 2 if module.endswith("/out") else 1
    return 3 if module == _FLATTENS_MAPS else 0


def add_lora(params: dict, patterns: Sequence[str], rank: int, key: PRNGKeyArray) -> dict:
    """Fresh A (uniform, as the layers') and B (zero), float32, for what a pattern finds.

    Returns a tree with ``{"a": (inputs, rank), "b": (rank, outputs)}`` in place of those kernels,
    axes flattened, and nothing else. Merged, it changes nothing yet.

    Args:
      params: arrays or shapes.

    Raises:
      ValueError: on a pattern without a layer, or a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"LoRA of rank {rank}: it must be 1 or more")
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        *folders, last = (part.key for part in path)
        axes = input_axes("/".join(folders), leaf.shape) if last == "kernel" else 0
        if axes:
            inputs, outputs = math.prod(leaf.shape[:axes]), math.prod(leaf.shape[axes:])
            found["/".join(folders)] = inputs, outputs
    chosen = set()
    for pattern in patterns:
        matching = {module for module in found if re.search(pattern, module)}
        if not matching:
            raise ValueError(f"LoRA pattern {pattern!r} finds no linear layer: see their paths")
        chosen |= matching
    lora: dict = {}
    for number, module in enumerate(sorted(chosen)):
        inputs, outputs = found[module]
        bound = 1.0 / math.sqrt(inputs)
        a = jax.random.uniform(
            jax.random.fold_in(key, number), (inputs, rank), minval=-bound, maxval=bound
        )
        node = lora
        for folder in module.split("/"):
            node = node.setdefault(folder, {})
        node["kernel"] = {"a": a, "b": jnp.zeros((rank, outputs))}
    return lora


def merge(params: dict, lora: dict, alpha: float) -> dict:
    """``params`` with W + alpha / rank * A B for every kernel that ``lora`` has; the rest as it is.

    Raises:
      KeyError: where ``lora`` has a layer that ``params`` lack.
    """
    merged = dict(params)
    for name, node in lora.items():
        if name == "kernel":
            kernel = params[name]
            delta = jnp.dot(node["a"], node["b"], precision="highest")
            delta = delta.reshape(kernel.shape) * (alpha / node["a"].shape[1])
            merged[name] = (kernel + delta).astype(kernel.dtype)
        else:
            merged[name] = merge(params[name], node, alpha)
    return merged

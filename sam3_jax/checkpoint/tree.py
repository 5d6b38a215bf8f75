"""Nested dictionaries of parameters, and their leaves by path."""

from __future__ import annotations

from typing import Any

import jax


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves of nested dictionaries (or any containers) by their path, joined by "/", in order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(leaves: dict[str, Any]) -> dict:
    """Inverse of :func:`flatten` for dictionaries."""
    tree: dict = {}
    for path, leaf in leaves.items():
        *folders, last = path.split("/")
        node = tree
        for name in folders:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree

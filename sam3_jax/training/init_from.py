"""Parameters of a run from those of another model: all of them, a backbone, some parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sam3_jax.training.optimizer import path_of

POSITION_TABLE = "vision/trunk/pos_embed"
_SHOWN = 4  # paths that an error message names


def init_from(params: dict, source: dict, prefixes: Sequence[str] = ("",)) -> dict:
    """``params`` with the values of ``source`` wherever a path starts with one of ``prefixes``.

    The vision trunk's position table may have another size: it is resized. Values keep the dtype of
    ``params``.

    Args:
      params: nested dictionary, the new model's fresh values.
      source: nested dictionary, for example of a loaded checkpoint.
      prefixes: such as "vision/trunk/", the backbone alone; "": everything.

    Raises:
      ValueError: where under a prefix either tree has a parameter that the other lacks, where
        shapes differ, or where a prefix finds nothing.
    """
    ours, given = _flatten(params), _flatten(source)
    for prefix in prefixes:
        if not any(path.startswith(prefix) for path in ours):
            raise ValueError(f"init_from: no parameter starts with {prefix!r}")
    wanted = [{path for path in tree if path.startswith(tuple(prefixes))} for tree in (ours, given)]
    problems = [
        *_report("the source lacks", wanted[0] - wanted[1]),
        *_report("the model lacks", wanted[1] - wanted[0]),
    ]
    values = {}
    for path in sorted(wanted[0] & wanted[1]):
        value, shape = given[path], ours[path].shape
        if path == POSITION_TABLE and value.shape != shape and value.shape[2:] == shape[2:]:
            value = resize_table(value, shape[:2])
        if value.shape != shape:
            problems.append(f"{path} is {value.shape} in the source, {shape} in the model")
        values[path] = value.astype(ours[path].dtype)
    if problems:
        raise ValueError(
            "init_from: "
            + "; ".join(problems)
            + ". Give the model the source's configuration, or name narrower prefixes"
        )
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: values.get(path_of(path), leaf), params
    )


def copy_within(params: dict, copies: Sequence[Sequence[str]]) -> dict:
    """``params`` with the values of one part in another: pairs of prefixes (to, from).

    Upstream's tracker begins so with the detector's neck (``sam2_convs`` in ``model/necks.py``).

    Raises:
      ValueError: where a prefix finds nothing, or the parts are not alike.
    """
    values = _flatten(params)
    for target, source in copies:
        parts = [
            {
                path.removeprefix(prefix): leaf.shape
                for path, leaf in values.items()
                if path.startswith(prefix)
            }
            for prefix in (target, source)
        ]
        if not parts[0] or parts[0] != parts[1]:
            raise ValueError(
                f"copy_within: {target!r} and {source!r} must be prefixes of parts that are alike"
            )
        # Copies: a step that is given the same buffer twice cannot take it over.
        values |= {target + rest: jnp.copy(values[source + rest]) for rest in parts[0]}
    return jax.tree_util.tree_map_with_path(lambda path, _: values[path_of(path)], params)


def scale_within(params: dict, scales: Sequence[tuple[str, float]]) -> dict:
    """``params`` with some values multiplied: pairs of a pattern of paths and a factor.

    Raises:
      ValueError: where a pattern finds nothing.
    """
    return _change_within(params, scales, "scale_within", lambda leaf, factor: leaf * factor)


def fill_within(params: dict, fills: Sequence[tuple[str, float]]) -> dict:
    """``params`` with some values replaced by a constant: pairs of a pattern of paths and it.

    Raises:
      ValueError: where a pattern finds nothing.
    """
    return _change_within(
        params, fills, "fill_within", lambda leaf, value: jnp.full_like(leaf, value)
    )


def _change_within(
    params: dict,
    changes: Sequence[tuple[str, float]],
    caller: str,
    change: Callable[[Array, float], Array],
) -> dict:
    paths = list(_flatten(params))
    for pattern, _ in changes:
        if not any(re.search(pattern, path) for path in paths):
            raise ValueError(f"{caller}: no parameter's path matches {pattern!r}")

    def changed(path: tuple, leaf: Array | np.ndarray) -> Array | np.ndarray:
        for pattern, number in changes:
            if re.search(pattern, path_of(path)):
                leaf = change(leaf, number)
        return leaf

    return jax.tree_util.tree_map_with_path(changed, params)


def resize_table(
    table: Float[Array | np.ndarray, "h w d"], size: tuple[int, int]
) -> Float[Array, "h2 w2 d"]:
    """Bicubic, as torch's ``interpolate`` (upstream: ``get_abs_pos`` in ``model/vitdet.py``)."""
    shape = (*size, table.shape[2])
    return jax.image.resize(table, shape, "cubic-pytorch", antialias=False)


def _flatten(tree: dict) -> dict:
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _report(what: str, paths: set[str]) -> list[str]:
    if not paths:
        return []
    shown = ", ".join(sorted(paths)[:_SHOWN])
    return [f"{what} {shown}" + (f" and {len(paths) - _SHOWN} more" * (len(paths) > _SHOWN))]

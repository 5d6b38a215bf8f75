"""Attention: every kernel that runs here against float64 numpy, masks, memory, meshes, TPUs."""

from __future__ import annotations

import functools
import itertools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from aot import compile_for, struct, tpu_mesh
from sam3_jax.ops import attention as module
from sam3_jax.ops import flash
from sam3_jax.ops.attention import attention
from sam3_jax.ops.chunked_attention import Operands, Tiles, chunked
from sam3_jax.sharding import BATCH_AXES

# Of the spread of the expected values. Float32: some ten roundings of 6e-8 at 50 to 90 keys;
# bfloat16: two roundings of 4e-3 (weights, result).
FLOAT32, BFLOAT16 = 1e-5, 1e-2
CASES = {
    "plain": (),
    "mask": ("key_mask",),
    "bias": ("bias",),
    "bias of all heads": ("shared_bias",),
    "causal": ("causal",),
    "everything": ("key_mask", "bias", "causal"),
}


def normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def inputs(
    rng: np.random.Generator,
    case: str,
    b: int = 2,
    n: int = 37,
    m: int = 53,
    h: int = 4,
    d: int = 8,
) -> tuple[list[jax.Array], dict[str, Any]]:
    """Float32 q, k, v and the keyword arguments of a case; the last masked entry has no key."""
    qkv = [normal(rng, b, size, h, d) for size in (n, m, m)]
    options: dict[str, Any] = {}
    for name in CASES[case]:
        if name == "key_mask":
            options[name] = jnp.asarray(rng.random((b, m)) < 0.6).at[-1].set(False)
        elif name == "causal":
            options[name] = True
        else:
            lead = (b, h) if name == "bias" else (1, 1)
            options["bias"] = normal(rng, *lead, n, m)
    return qkv, options


def reference(
    q: Any,
    k: Any,
    v: Any,
    grad: Any,
    *,
    bias: Any = None,
    key_mask: Any = None,
    causal: bool = False,
) -> dict[str, np.ndarray]:
    """Result and gradients (for the result's cotangent ``grad``) by the textbook, in float64."""
    q, k, v, grad = (np.asarray(x, np.float64) for x in (q, k, v, grad))
    scale = q.shape[-1] ** -0.5
    s = np.einsum("bnhd,bmhd->bhnm", q, k) * scale
    if bias is not None:
        s = s + np.asarray(bias)
    valid = np.ones(s.shape, bool)
    if key_mask is not None:
        valid &= np.asarray(key_mask)[:, None, None]
    if causal:
        valid &= np.arange(s.shape[2])[:, None] >= np.arange(s.shape[3])
    p = np.where(valid, np.exp(s - s.max(axis=-1, keepdims=True)), 0)
    total = p.sum(axis=-1, keepdims=True)
    p /= np.where(total == 0, 1, total)
    out = np.einsum("bhnm,bmhd->bnhd", p, v)
    dp = np.einsum("bnhd,bmhd->bhnm", grad, v)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True))
    expected = {
        "out": out,
        "q": np.einsum("bhnm,bmhd->bnhd", ds, k) * scale,
        "k": np.einsum("bhnm,bnhd->bmhd", ds, q) * scale,
        "v": np.einsum("bhnm,bnhd->bmhd", p, grad),
    }
    if bias is not None:
        axes = tuple(i for i in range(4) if bias.shape[i] == 1)
        expected["bias"] = ds.sum(axis=axes, keepdims=True)
    return expected


def evaluate(f: Any, qkv: list, grad: Any, *, bias: Any = None, **options: Any) -> dict[str, Any]:
    """What :func:`reference` gives, from ``f`` and its automatic gradients."""
    args = [*qkv] if bias is None else [*qkv, bias]

    def run(*args: Any) -> Any:
        extra = {"bias": args[3]} if len(args) == 4 else {}
        return f(*args[:3], **extra, **options)

    @jax.jit
    def both(*args: Any) -> Any:
        out, pull = jax.vjp(run, *args)
        return out, *pull(grad.astype(out.dtype))

    return dict(zip(("out", "q", "k", "v", "bias"), both(*args), strict=False))


def check(actual: dict[str, Any], expected: dict[str, np.ndarray], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = np.asarray(actual[name], np.float64)
        assert np.isfinite(got).all(), name
        atol = tolerance * want.std()
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=atol, err_msg=name)


def tiled(
    q: Any,
    k: Any,
    v: Any,
    bias: Any = None,
    key_mask: Any = None,
    causal: bool = False,
    *,
    tiles: Tiles,
) -> Any:
    return chunked(Operands(q, k, v, bias, key_mask), causal=causal, rate=0.0, tiles=tiles)


KERNELS = {
    "naive": functools.partial(attention, implementation="naive"),
    "chunked": functools.partial(attention, implementation="chunked"),
    "splash": functools.partial(attention, implementation="splash"),  # interpreted
    "auto": attention,
    # 37 queries and 53 keys divide into neither; one head, two heads, whole batch entries, all.
    "head": functools.partial(tiled, tiles=Tiles(16, 20, 0, 1, True)),
    "heads": functools.partial(tiled, tiles=Tiles(16, 53, 0, 2 * 13 * 53, False)),
    "batch": functools.partial(tiled, tiles=Tiles(37, 20, 0, 4 * 37 * 18, True)),
    "all": functools.partial(tiled, tiles=Tiles(10, 10, 0, 1 << 30, False)),
}
PAIRS = [
    *itertools.product(["naive", "chunked"], CASES),
    *itertools.product(["splash"], ["plain", "mask", "causal"]),
    *itertools.product(["auto"], ["plain", "everything"]),
    *itertools.product(["head", "heads", "batch", "all"], ["bias of all heads", "everything"]),
]


@pytest.mark.parametrize(("kernel", "case"), PAIRS)
def test_matches_float64(rng: np.random.Generator, kernel: str, case: str) -> None:
    qkv, options = inputs(rng, case)
    grad = normal(rng, *qkv[0].shape)
    actual = evaluate(KERNELS[kernel], qkv, grad, **options)
    assert actual["out"].dtype == jnp.float32
    check(actual, reference(*qkv, grad, **options), FLOAT32)


@pytest.mark.parametrize("kernel", ["chunked", "splash"])
def test_bfloat16(rng: np.random.Generator, kernel: str) -> None:
    qkv, options = inputs(rng, "mask")
    qkv = [jnp.asarray(x, jnp.bfloat16) for x in qkv]
    grad = normal(rng, *qkv[0].shape)
    actual = evaluate(KERNELS[kernel], qkv, grad, **options)
    assert actual["out"].dtype == jnp.bfloat16
    check({"out": actual["out"]}, {"out": reference(*qkv, grad, **options)["out"]}, 3 * BFLOAT16)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [32, 256])
@pytest.mark.parametrize("case", ["plain", "mask", "bias", "bias of all heads", "causal"])
def test_cudnn_matches_float64(rng: np.random.Generator, case: str, d: int) -> None:
    if d > flash.cudnn_head_limit():
        pytest.skip("not on this GPU")
    qkv, options = inputs(rng, case, n=201, m=517, h=4, d=d)
    qkv = [jnp.asarray(x, jnp.bfloat16) for x in qkv]
    grad = jnp.asarray(rng.normal(size=qkv[0].shape), jnp.bfloat16)
    f = functools.partial(attention, implementation="cudnn")
    actual = evaluate(f, qkv, grad, **options)
    # Ten times: gradients sum products of three rounded factors; single entries, not the mean.
    check(actual, reference(*qkv, grad, **options), 10 * BFLOAT16)


@pytest.mark.parametrize("kernel", ["chunked", "splash", "head"])
def test_rows_without_keys_are_zero(rng: np.random.Generator, kernel: str) -> None:
    qkv, options = inputs(rng, "mask")
    actual = evaluate(KERNELS[kernel], qkv, jnp.ones_like(qkv[0]), **options)
    for name, value in actual.items():
        np.testing.assert_array_equal(value[-1], 0, err_msg=name)


def test_tiles_do_not_change_the_result(rng: np.random.Generator) -> None:
    """The result; gradients in tiles are compared with the reference above."""
    (q, k, v), options = inputs(rng, "everything", n=96, m=90)
    x = Operands(q, k, v, options["bias"], options["key_mask"])
    want = np.asarray(attention(q, k, v, implementation="naive", **options), np.float64)
    for tiles in [Tiles(32, 45, 0, 1, True), Tiles(7, 11, 0, 1 << 20, False)]:
        f = jax.jit(functools.partial(chunked, causal=True, rate=0.0, tiles=tiles))
        check({"out": f(x)}, {"out": want}, FLOAT32)


def weights(rng: np.random.Generator, rate: float, key: Any, **options: Any) -> tuple[Any, Any]:
    """Attention weights (2, 4, 300, 64) with and without dropout, read off with v = identity."""
    q, k = (normal(rng, 2, size, 4, 64) for size in (300, 64))
    v = jnp.broadcast_to(jnp.eye(64)[:, None], (2, 64, 4, 64))
    dropped = attention(q, k, v, dropout_rate=rate, dropout_rng=key, **options)
    return (np.moveaxis(np.asarray(x), 1, 2) for x in (dropped, attention(q, k, v)))


@pytest.mark.parametrize(("implementation", "new_style"), [("naive", True), ("auto", False)])
def test_dropout(rng: np.random.Generator, implementation: str, new_style: bool) -> None:
    key = (jax.random.key if new_style else jax.random.PRNGKey)(1)
    dropped, whole = weights(rng, 0.1, key, implementation=implementation)
    kept = dropped != 0
    # 153600 draws: one standard deviation of the share is .0008.
    assert abs(kept.mean() - 0.9) < 0.004
    np.testing.assert_allclose(dropped[kept], whole[kept] / 0.9, rtol=1e-5)
    # Neighbours are independent: batch entries, heads, queries, keys.
    for axis in range(4):
        pair = np.take(kept, 0, axis=axis), np.take(kept, 1, axis=axis)
        expected = 0.9**2 + 0.1**2  # chance to agree
        assert abs((pair[0] == pair[1]).mean() - expected) < 0.06, axis


def test_dropout_backward_uses_the_same_weights(rng: np.random.Generator) -> None:
    (q, k, v), _ = inputs(rng, "plain", m=8)
    options = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(3)}
    eye = jnp.broadcast_to(jnp.eye(8)[:, None], v.shape)
    p = attention(q, k, eye, **options)
    grad = normal(rng, *q.shape)
    actual = evaluate(attention, [q, k, v], grad, **options)
    np.testing.assert_allclose(actual["v"], np.einsum("bnhm,bnhd->bmhd", p, grad), atol=1e-5)
    # The derivative along a direction, by central differences.
    step = normal(rng, *q.shape)
    ends = [(attention(q + e * step, k, v, **options) * grad).sum() for e in (1e-2, -1e-2)]
    slope = (actual["q"] * step).sum()
    np.testing.assert_allclose((ends[0] - ends[1]) / 2e-2, slope, rtol=2e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_never_holds_the_whole_matrix(dropout: float) -> None:
    side, heads = 5184, 2
    x = jax.ShapeDtypeStruct((1, side, heads, 32), jnp.float32)

    def loss(q: Any, k: Any, v: Any) -> Any:
        return attention(q, k, v, dropout_rate=dropout, dropout_rng=jax.random.key(0)).sum()

    for f in (loss, jax.grad(loss, argnums=(0, 1, 2))):
        compiled = jax.jit(f).lower(x, x, x).compile()
        assert f"{side},{side}]" not in compiled.as_text()
        # Less than one of the two heads: a tile is a twelfth, and backward holds a few of them.
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * side * side


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"implementation": "fast"}, "choose one of"),
        ({"dropout_rate": 0.1}, "needs dropout_rng"),
        ({"implementation": "cudnn"}, "16-bit inputs, not float32"),
        ({"implementation": "splash", "bias": jnp.zeros((1, 1, 4, 4))}, "takes no bias"),
        (
            {"implementation": "splash", "dropout_rate": 0.1, "dropout_rng": jax.random.key(0)},
            'has no dropout; use "auto"',
        ),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    x = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ValueError, match=message):
        attention(x, x, x, **options)


def test_cudnn_refuses_head_size() -> None:
    x = jnp.zeros((1, 4, 1, 512), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"up to (128|256) here, not 512"):
        attention(x, x, x, implementation="cudnn")


@pytest.mark.parametrize(
    ("backend", "capability", "limit"),
    [("cpu", None, 128), ("gpu", "8.0", 128), ("gpu", "9.0", 256), ("gpu", "12.0", 128)],
)
def test_cudnn_takes_large_heads_on_hopper(
    monkeypatch: pytest.MonkeyPatch, backend: str, capability: str, limit: int
) -> None:
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert flash.cudnn_head_limit.__wrapped__() == limit


def test_mixed_dtypes_are_refused() -> None:
    x = jnp.zeros((1, 4, 1, 8))
    with pytest.raises(ValueError, match="float32, bfloat16, float32: cast them"):
        attention(x, x.astype(jnp.bfloat16), x)


def test_mesh_axes_are_those_of_sharding() -> None:
    assert module.BATCH_AXES == BATCH_AXES


@pytest.mark.parametrize(
    ("implementation", "b"),
    [("chunked", 4), ("chunked", 3), ("splash", 4)],  # 3 does not divide the mesh of 4 x 2
)
def test_mesh_gives_what_one_device_gives(
    rng: np.random.Generator, implementation: str, b: int
) -> None:
    case = "mask" if implementation == "splash" else "everything"
    qkv, options = inputs(rng, case, b=b)
    grad = normal(rng, *qkv[0].shape)
    f = functools.partial(attention, implementation=implementation)
    if implementation == "chunked":  # dropout too must not depend on the mesh
        f = functools.partial(f, dropout_rate=0.3, dropout_rng=jax.random.key(0))
    alone = evaluate(f, qkv, grad, **options)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        together = evaluate(f, qkv, grad, **options)
    if b == 4:
        assert len(together["out"].sharding.device_set) == 8
        assert not together["out"].sharding.is_fully_replicated
    check(together, {k: np.asarray(x, np.float64) for k, x in alone.items()}, FLOAT32)


@pytest.mark.parametrize(
    ("n", "dtype", "options", "pallas"),
    [
        (576, jnp.bfloat16, {}, True),
        (576, jnp.bfloat16, {"key_mask": True}, True),
        (576, jnp.bfloat16, {"bias": True}, False),
        (576, jnp.bfloat16, {"dropout": True}, False),
        (576, jnp.float32, {}, False),
        (32, jnp.bfloat16, {}, False),
    ],
)
def test_auto_chooses_by_the_platform_lowered_for(
    n: int, dtype: Any, options: dict[str, bool], pallas: bool
) -> None:
    x = jax.ShapeDtypeStruct((2, n, 4, 64), dtype)

    def f(q: Any, k: Any, v: Any) -> Any:
        extra: dict[str, Any] = {}
        if "key_mask" in options:
            extra["key_mask"] = jnp.ones((2, n), bool)
        if "bias" in options:
            extra["bias"] = jnp.ones((2, 4, n, n))
        if "dropout" in options:
            extra |= {"dropout_rate": 0.1, "dropout_rng": jax.random.key(0)}
        return attention(q, k, v, **extra)

    traced = jax.jit(f).trace(x, x, x)
    for platform in ("tpu", "cpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("tpu_custom_call" in text) == (pallas and platform == "tpu")


def test_topologies() -> None:
    with pytest.raises(ValueError, match="power of two"):
        tpu_mesh("v5e", data=3)
    mesh = tpu_mesh("v6e", data=4, tensor=2)
    assert dict(mesh.shape) == {"data": 4, "tensor": 2}
    assert {device.platform for device in mesh.devices.flat} == {"tpu"}


# What attends in bfloat16 per image: (batch, tokens, heads, head size), and the share of the score
# matrix (float32) that the temporaries of forward and backward may take. Windows are not far apart:
# 576 scores a query against 4 x 64 padded values and their gradients.
SHAPES = {
    "global": ((1, 5184, 16, 64), 1 / 8),
    "window": ((9, 576, 16, 64), 1),
    "fusion": ((1, 5184, 8, 32), 1 / 8),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("generation", "mesh_shape", "shape"),
    list(itertools.product(["v5e", "v6e"], [(1, 1), (4, 2)], SHAPES)),
)
def test_splash_compiles_for_tpus(generation: str, mesh_shape: tuple[int, int], shape: str) -> None:
    mesh = tpu_mesh(generation, *mesh_shape)
    (b, n, h, d), share = SHAPES[shape]
    b *= 2 * mesh_shape[0]  # two images a chip
    x = struct(mesh, (b, n, h, d), jnp.bfloat16, "data", None, "tensor")
    grads = jax.grad(lambda *qkv: attention(*qkv).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    for f, calls in ((attention, 1), (grads, 3)):
        compiled = compile_for(mesh, f, x, x, x)
        text = compiled.as_text()
        assert text.count("tpu_custom_call") == calls  # forward; forward, dq, dkv
        assert "all-gather" not in text
        scores = 4 * b * h * n * n / mesh.size
        assert compiled.memory_analysis().temp_size_in_bytes < share * scores


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["global", "fusion"])
def test_chunked_compiles_for_tpus(shape: str) -> None:
    """Float32, and training with dropout, over several chips."""
    mesh = tpu_mesh("v5e", 4, 2)
    (_, n, h, d), _ = SHAPES[shape]
    rate, dtype = (0.1, jnp.bfloat16) if shape == "fusion" else (0.0, jnp.float32)
    x = struct(mesh, (4, n, h, d), dtype, "data", None, "tensor")

    def loss(q: Any, k: Any, v: Any) -> Any:
        out = attention(q, k, v, dropout_rate=rate, dropout_rng=jax.random.key(0))
        return out.astype(jnp.float32).sum()

    compiled = compile_for(mesh, jax.grad(loss, argnums=(0, 1, 2)), x, x, x)
    text = compiled.as_text()
    assert f"{n},{n}]" not in text
    assert "all-gather" not in text
    # Two tiles of 576 queries for all heads of a chip, and the results.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * (h // 2) * n * n / 2

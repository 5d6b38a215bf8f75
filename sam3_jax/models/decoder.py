"""Object decoder with box refinement and presence token (paper section 3).

Upstream: ``sam3/model/decoder.py``.

Post-norm layers: self-attention, cross-attention to the prompt, cross-attention to the image with
a bias relative to each query's box, feed-forward. With DAC (training) every query has a one-to-many
copy that skips self-attention.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sam3_jax.config import DecoderConfig
from sam3_jax.models.layers import Attention, Embedding, Head, LayerNorm, Mlp
from sam3_jax.ops.boxes import cxcywh_to_xyxy, inverse_sigmoid
from sam3_jax.ops.position import sine_boxes
from sam3_jax.types import DecoderOutput

Grid = tuple[int, int]
_PRESENCE_ROW = ((0, 0), (1, 0), (0, 0))  # padding that prepends a zero row to (p, q, d)


class BoxBias(nn.Module):
    """Attention bias from the signed log distances of every cell to the sides of a box."""

    dim: int
    num_heads: int

    @nn.compact
    def __call__(
        self, boxes: Float[Array, "p q 4"], grids: tuple[Grid, ...]
    ) -> Float[Array, "p h q n"]:
        corners = cxcywh_to_xyxy(boxes)
        x_head = Head(self.dim, self.num_heads, 2, init="xavier", name="x")
        y_head = Head(self.dim, self.num_heads, 2, init="xavier", name="y")
        levels = []
        for height, width in grids:
            x = x_head(_log_distance(jnp.arange(width) / width, corners[..., 0::2]))
            y = y_head(_log_distance(jnp.arange(height) / height, corners[..., 1::2]))
            bias = y[:, :, :, None, :] + x[:, :, None, :, :]  # p q height width heads
            levels.append(bias.reshape(*bias.shape[:2], -1, self.num_heads))
        return jnp.concatenate(levels, axis=2).transpose(0, 3, 1, 2)


def _log_distance(
    cells: Float[Array, " n"], sides: Float[Array, "p q 2"]
) -> Float[Array, "p q n 2"]:
    delta = 8.0 * (cells[None, None, :, None] - sides[:, :, None, :])
    return jnp.sign(delta) * jnp.log2(jnp.abs(delta) + 1.0) / math.log2(8)


def _spread_boxes(
    key: Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32
) -> Float[Array, "q 4"]:
    """Logits of boxes that cover the picture evenly, to start from instead of chance.

    Each query then has objects near it from the first step on, where boxes at random begin alike in
    the middle, half as large as the picture. Centres are the Kronecker sequence of the plastic
    number, sides the distance between neighbours.
    """
    plastic = 1.32471795724474602596
    centres = (0.5 + jnp.arange(1, shape[0] + 1)[:, None] / plastic ** jnp.array([1, 2])) % 1.0
    sides = jnp.full_like(centres, shape[0] ** -0.5)
    return inverse_sigmoid(jnp.concatenate([centres, sides], axis=1)).astype(dtype)


def look_inside(params: dict, strength: float = 10.0) -> dict:
    """Fresh parameters of a decoder whose queries look into their boxes, and hardly elsewhere.

    From random values attention begins even: every query reads the same mean of the picture, and
    after hundreds of steps nothing tells them apart. Here two hidden units of each axis measure how
    far a cell lies beyond either side, and take ``strength`` times that from the attention's
    logits; a cell of a twelfth of the picture outside costs 2.5.
    """
    bias = {}
    for axis, head in params["box_bias"].items():
        first, last = head["layer_0"], head["layer_1"]
        beyond = jnp.array([[-1.0, 0.0], [0.0, 1.0]])  # the sides are those of _log_distance
        first = {
            "kernel": first["kernel"].at[:, :2].set(beyond),
            "bias": first["bias"].at[:2].set(0.0),
        }
        last = last | {"kernel": last["kernel"].at[:2].set(-strength)}
        bias[axis] = {"layer_0": first, "layer_1": last}
    return params | {"box_bias": bias}


class DecoderLayer(nn.Module):
    """One post-norm layer. The presence token stands first in the query axis."""

    config: DecoderConfig
    dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "p q d"],
        pos: Float[Array, "#p q d"],
        prompt: Float[Array, "p m d"],
        prompt_mask: Bool[Array, "p m"],
        memory: Float[Array, "p n d"],
        memory_pos: Float[Array, "#p n d"],
        bias: Float[Array, "#p h q n"],
        one_to_one: int,
        deterministic: bool = True,
    ) -> Float[Array, "p q d"]:
        """``one_to_one``: leading queries that take part in self-attention."""
        cfg = self.config

        def attend(name: str) -> Attention:
            return Attention(
                self.dim,
                cfg.num_heads,
                dropout=cfg.dropout,
                out_init="xavier_zero_bias",
                dtype=self.dtype,
                name=name,
            )

        drop = nn.Dropout(cfg.dropout, deterministic=deterministic)
        own, copies = x[:, :one_to_one], x[:, one_to_one:]
        q = own + pos[:, :one_to_one]
        own = own + drop(attend("self_attn")(q, q, own, deterministic=deterministic))
        x = LayerNorm(name="norm_self")(jnp.concatenate([own, copies], axis=1))
        y = attend("prompt_attn")(
            x + pos, prompt, prompt, key_mask=prompt_mask, deterministic=deterministic
        )
        x = LayerNorm(name="norm_prompt")(x + drop(y))
        y = attend("image_attn")(
            x + pos, memory + memory_pos, memory, bias=bias, deterministic=deterministic
        )
        x = LayerNorm(name="norm_image")(x + drop(y))
        # Float32 by upstream's choice; negligible for a few hundred queries.
        ffn = Mlp(cfg.mlp_dim, self.dim, nn.relu, cfg.dropout, "xavier", name="ffn")
        return LayerNorm(name="norm_ffn")(x + drop(ffn(x, deterministic=deterministic)))


class Decoder(nn.Module):
    """Learned queries to boxes and states, layer by layer."""

    config: DecoderConfig
    dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        memory: Float[Array, "p n d"],
        memory_pos: Float[Array, "#p n d"],
        grids: tuple[Grid, ...],
        prompt: Float[Array, "p m d"],
        prompt_mask: Bool[Array, "p m"],
        *,
        dac: bool = False,
        deterministic: bool = True,
    ) -> DecoderOutput:
        """``grids``: (height, width) of the levels that ``memory`` holds."""
        cfg = self.config
        prompts, copies = memory.shape[0], 2 if dac else 1
        queries = Embedding(cfg.num_queries, self.dim, name="query_embed")()
        start = _spread_boxes if cfg.spread_queries else nn.initializers.normal(1.0)
        reference = nn.sigmoid(Embedding(cfg.num_queries, 4, start, name="reference_points")())
        presence = Embedding(1, self.dim, nn.initializers.xavier_uniform(), name="presence_token")()
        x = jnp.concatenate([presence, *[queries] * copies])
        x = jnp.broadcast_to(x, (prompts, *x.shape))
        # The first layer reads the same boxes for every prompt: one row, until a layer moves them.
        boxes = jnp.concatenate([reference] * copies)[None]
        norm = LayerNorm(name="norm")
        presence_norm = LayerNorm(name="presence_norm")
        presence_head = Head(self.dim, 1, 3, init="xavier", name="presence_head")
        box_head = Head(self.dim, 4, 3, init="torch", last_init="zeros", name="box_head")
        query_pos = Head(self.dim, self.dim, 2, init="xavier", name="reference_head")
        box_bias = BoxBias(self.dim, cfg.num_heads, name="box_bias")
        layer = nn.remat(DecoderLayer, static_argnums=(8, 9)) if cfg.remat else DecoderLayer

        # Each output box sees the gradient of this and the previous refinement ("look forward
        # twice"); what the next layer reads is stopped. Both have the same value.
        previous = reference = boxes
        outputs = []
        for i in range(cfg.depth):
            pos = jnp.pad(query_pos(sine_boxes(reference, self.dim // 2)), _PRESENCE_ROW)
            bias = jnp.pad(box_bias(reference, grids), ((0, 0), *_PRESENCE_ROW))
            x = layer(cfg, self.dim, self.dtype, name=f"layer_{i}")(
                x,
                pos,
                prompt,
                prompt_mask,
                memory,
                memory_pos,
                bias,
                1 + cfg.num_queries,
                deterministic,
            )
            states = norm(x[:, 1:])
            delta = box_head(states)
            boxes = nn.sigmoid(inverse_sigmoid(previous) + delta)
            previous = nn.sigmoid(inverse_sigmoid(reference) + delta)
            reference = lax.stop_gradient(previous)
            logits = presence_head(presence_norm(x[:, 0]))[..., 0]
            outputs.append(DecoderOutput(states, boxes, logits))
        return DecoderOutput(*(jnp.stack(values) for values in zip(*outputs, strict=True)))

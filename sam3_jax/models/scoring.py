"""Dot-product scoring of queries against the mean prompt.

Upstream: ``DotProductScoring`` in ``sam3/model/model_misc.py``.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sam3_jax.config import ScoringConfig
from sam3_jax.models.layers import LayerNorm, Linear, Mlp


class Scoring(nn.Module):
    """Class logits, computed in float32."""

    config: ScoringConfig
    dim: int

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "l p q d"],
        prompt: Float[Array, "p m d"],
        prompt_mask: Bool[Array, "p m"],
        *,
        deterministic: bool = True,
    ) -> Float[Array, "l p q"]:
        cfg = self.config
        prompt = prompt.astype(jnp.float32)
        mlp = Mlp(cfg.mlp_dim, self.dim, nn.relu, cfg.dropout, name="prompt_mlp")
        prompt = LayerNorm(name="prompt_norm")(prompt + mlp(prompt, deterministic=deterministic))
        weight = prompt_mask.astype(jnp.float32)[..., None]
        pooled = (prompt * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1.0)
        pooled = Linear(self.dim, name="prompt_proj")(pooled)
        queries = Linear(self.dim, name="query_proj")(queries)
        logits = jnp.einsum("lpqd,pd->lpq", queries, pooled, precision="highest") / self.dim**0.5
        return jnp.clip(logits, -cfg.clamp, cfg.clamp)

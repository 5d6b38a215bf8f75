"""Tokens of prompts put together: behind each other, and to one length."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from sam3_jax.types import TextFeatures


def joined(first: TextFeatures, second: TextFeatures) -> TextFeatures:
    """The tokens of one prompt, and behind them more tokens of it."""
    return TextFeatures(
        jnp.concatenate([first.tokens, second.tokens], axis=1),
        jnp.concatenate([first.mask, second.mask], axis=1),
    )


def same_length(texts: Sequence[TextFeatures]) -> list[TextFeatures]:
    """Pads prompts of different lengths (those with exemplars of other images are longer)."""
    longest = max(text.mask.shape[1] for text in texts)

    def padded(text: TextFeatures) -> TextFeatures:
        more = longest - text.mask.shape[1]
        if not more:
            return text
        return TextFeatures(
            jnp.pad(text.tokens, ((0, 0), (0, more), (0, 0))),
            jnp.pad(text.mask, ((0, 0), (0, more))),
        )

    return [padded(text) for text in texts]

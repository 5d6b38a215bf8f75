"""How well trunk and text encoder know words: ``python docs/demo/words.py CHECKPOINT``.

Every object of held-out pictures is the mean of the map under its mask, and is compared with single
words by the cosine, as in training by contrast. Objects of pairs of colour and shape that training
never shows together are counted apart.
"""

from __future__ import annotations

import argparse
import collections

import jax
import jax.numpy as jnp
import numpy as np

from sam3_jax import checkpoint
from sam3_jax.data.resize import resize_image
from sam3_jax.demo.layout import SceneConfig
from sam3_jax.demo.objects import COLORS, DIGITS, SHAPES, UNSEEN
from sam3_jax.demo.render import visible_masks
from sam3_jax.demo.scene import objects_of, pixels_of
from sam3_jax.models.detector import Sam3
from sam3_jax.tokenizer import default_tokenizer

WORDS = {"color": tuple(COLORS), "shape": SHAPES + DIGITS}


def accuracies(folder: str, pictures: int, side: int) -> dict[str, tuple[float, int]]:
    """Share of the objects whose own word is the nearest, and their number, by kind."""
    loaded = checkpoint.load(folder, parts=["image"])
    params = {"params": jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), loaded.params)}
    model = Sam3(loaded.config, jnp.float32)

    def levels(module: Sam3, pixels: jax.Array) -> jax.Array:
        return module.encode_image(pixels, tracker=False).detector[-1]

    encode = jax.jit(lambda pixels: model.apply(params, pixels, method=levels)[0])
    texts = {}
    for kind, words in WORDS.items():
        phrases = [f"{word} object" if kind == "color" else word for word in words]
        tokens = default_tokenizer()(phrases, loaded.config.text.context_length)
        text = model.apply(params, jnp.asarray(tokens), method=Sam3.encode_text)
        texts[kind] = _unit(np.asarray((text.tokens * text.mask[..., None]).sum(1)))

    right = collections.defaultdict(list)
    for split in ("valid", "unseen"):
        for index in range(pictures):
            objects = objects_of(SceneConfig(), split, index)
            if not objects:
                continue
            picture = np.asarray(pixels_of(SceneConfig(), split, index, objects))
            pixels = resize_image(picture, (side, side)).astype(np.float32) / 127.5 - 1
            found = np.asarray(encode(jnp.asarray(pixels)[None]))
            masks = jnp.asarray(visible_masks(objects, len(picture)), jnp.float32)
            cover = jax.image.resize(masks, (len(masks), *found.shape[:2]), "linear")
            means = _unit(np.einsum("nhw,hwd->nd", np.asarray(cover), found))
            for one, mean in zip(objects, means, strict=True):
                for kind, words in WORDS.items():
                    nearest = words[int((texts[kind] @ mean).argmax())]
                    name = "digit" if kind == "shape" and one.is_digit else kind
                    if split == "valid":
                        right[name].append(nearest == getattr(one, kind))
                    elif (one.color, one.shape) in UNSEEN:
                        right[f"{name} of an unseen pair"].append(nearest == getattr(one, kind))
    return {name: (float(np.mean(hits)), len(hits)) for name, hits in right.items()}


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-12)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="of any stage")
    parser.add_argument("--pictures", type=int, default=48, help="of each set (default 48)")
    parser.add_argument("--side", type=int, default=256, help="pixels (default 256)")
    args = parser.parse_args()
    for name, (share, count) in accuracies(args.checkpoint, args.pictures, args.side).items():
        print(f"{name}: {100 * share:.1f}% of {count}")


if __name__ == "__main__":
    main()

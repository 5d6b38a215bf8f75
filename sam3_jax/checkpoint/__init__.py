"""Saves and loads the parameters of a model: Orbax arrays and a ``config.json`` beside them.

A checkpoint is a folder::

    config.json   what the parameters are: format, architecture, parts, configuration, origin
    params/       the parameters (Orbax, uncompressed)
    unused/       tensors of the release that nothing reads, kept to be written back

The names here are what programs need; ``saving.py`` and ``loading.py`` do the work,
``staging.py`` puts any output of the package in its place when it is complete.
"""

from sam3_jax.checkpoint.description import is_checkpoint
from sam3_jax.checkpoint.errors import CheckpointError
from sam3_jax.checkpoint.loading import Loaded, load, load_unused
from sam3_jax.checkpoint.parts import PARTS, WHOLE
from sam3_jax.checkpoint.saving import save

__all__ = [
    "PARTS",
    "WHOLE",
    "CheckpointError",
    "Loaded",
    "is_checkpoint",
    "load",
    "load_unused",
    "save",
]

"""Imports torch, torchvision and transformers where torchvision's compiled operators do not load.

With a CPU build of torch the binary part of torchvision may be missing, and then its Python part
fails at import time because it registers shape functions for operators nobody defined. Defining
the bare schemas lets it finish; the operators themselves stay unusable, see ``roi.py``.
"""

from __future__ import annotations

import sys

from torch import library

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: library.Library | None = None  # must outlive the import


def import_torchvision() -> None:
    """Imports torchvision, with placeholder operator schemas if its normal import fails."""
    global _library
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # left half initialised by the failed import
        _library = library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            _library.define(schema)
        import torchvision  # noqa: F401


import_torchvision()

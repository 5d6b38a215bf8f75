"""The weights that the package ships: a small SAM 3 that knows the demo's shapes and digits."""

from __future__ import annotations

from pathlib import Path

from sam3_jax.inference.options import Options

FOLDER = Path(__file__).resolve().parents[1] / "assets" / "demo"
# The decoder has not learned to give every object once; objects of the demo hardly overlap.
DISTINCT = Options(nms="iou", nms_threshold=0.3)
KNOWN = "the bundled demonstration weights, which know coloured shapes and digits"


def weights_path() -> Path:
    """The folder of the bundled checkpoint, for ``ImagePredictor.from_pretrained``.

    Raises:
      FileNotFoundError: this installation lacks it.
    """
    if not (FOLDER / "config.json").is_file():
        raise FileNotFoundError(
            f"{FOLDER}: the bundled demonstration weights are missing; install the package again, "
            "or train them (configs/sam3_demo.py) and run python -m sam3_jax.demo.bundle"
        )
    return FOLDER

"""The oracle of the parity tests: torch SAM 3 with the released model's behaviour.

transformers' ``Sam3Model`` and ``Sam3TrackerModel`` with seeded weights, called so that they
compute what upstream's own code (facebookresearch/sam3) computes. This package is the only place
that knows their quirks::

    import oracle

    model = oracle.randomize(oracle.tiny_detector(), seed=0)
    expected = oracle.run_detector(model, pixels, token_ids, boxes, box_labels)

Arrays come and go as numpy in this project's conventions: channels last, boxes (cx, cy, w, h)
fractions, True = valid, names of ``sam3_jax.types``. All is float32 and in evaluation mode.
"""

from . import torch_import  # noqa: F401, I001  (first: repairs torchvision's import)
from .build import (
    full_detector,
    full_tracker,
    full_tracker_video,
    full_video,
    tiny_detector,
    tiny_tracker,
    tiny_tracker_video,
    tiny_video,
)
from .checkpoint import fake_sam3_pt, sam3_pt_tensors
from .detector import (
    detect,
    divide_and_conquer,
    encode_image,
    run_detector,
    run_text,
    run_vision,
)
from .geometry import add_point_prompts
from .interactive import encode_click_image, run_click
from .roi_align import roi_align
from .weights import randomize

__all__ = [
    "add_point_prompts",
    "detect",
    "divide_and_conquer",
    "encode_click_image",
    "encode_image",
    "fake_sam3_pt",
    "full_detector",
    "full_tracker",
    "full_tracker_video",
    "full_video",
    "randomize",
    "roi_align",
    "run_click",
    "run_detector",
    "run_text",
    "run_vision",
    "sam3_pt_tensors",
    "tiny_detector",
    "tiny_tracker",
    "tiny_tracker_video",
    "tiny_video",
]

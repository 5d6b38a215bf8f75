"""What becomes of the model's outputs: everything that can be chosen after the forward pass."""

from __future__ import annotations

from typing import NamedTuple

NMS = ("none", "iou", "iom")
BOXES = ("auto", "model", "masks")


class Options(NamedTuple):
    """Choices that need no other weights and no other program.

    ``nms`` drops the worse of two instances of a prompt whose masks overlap by more than
    ``nms_threshold``: "iou" measures intersection over union, "iom" over the smaller area (parts of
    things). ``boxes`` "masks" draws each box tightly around its mask; "model" takes the predicted
    one; "auto" the predicted one at the resolution that the model was trained at, and elsewhere,
    where predicted boxes shrink, the mask's.
    """

    presence: bool = True  # multiply by the concept's probability to be there at all
    nms: str = "none"
    nms_threshold: float = 0.5
    max_instances: int = 0  # the best so many; 0: all
    boxes: str = "auto"

    def check(self) -> Options:
        """Returns itself.

        Raises:
          ValueError: on a value that is none of the choices.
        """
        if self.nms not in NMS:
            raise ValueError(f"nms must be one of {', '.join(NMS)}, got {self.nms!r}")
        if not 0 <= self.nms_threshold <= 1:
            raise ValueError(f"nms_threshold must be between 0 and 1, got {self.nms_threshold}")
        if self.boxes not in BOXES:
            raise ValueError(f"boxes must be one of {', '.join(BOXES)}, got {self.boxes!r}")
        if self.max_instances < 0:
            raise ValueError(f"max_instances must be 0 (all) or more, got {self.max_instances}")
        return self


DEFAULTS = Options()

"""Published figures of the released checkpoint, and the pictures and the video they belong to.

From the integration tests of Hugging Face transformers (tests/models/sam3, sam3_tracker,
sam3_tracker_video and sam3_video in its repository), so of its variant of the model: see
``hf_variant`` and ``hf_video``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hf_variant import ClickFigures, ConceptFigures

_COCO = "http://images.cocodataset.org/val2017"
_HUB = "https://huggingface.co/datasets"
_FIXTURES = f"{_HUB}/hf-internal-testing/sam2-fixtures/resolve/main"
_DOCUMENTATION = f"{_HUB}/huggingface/documentation-images/resolve/main/transformers/model_doc"
# Names the files must have -> where they are.
CAT, KITCHEN, TRUCK, GROCERIES, DOG = PICTURES = {
    "000000077595.jpg": f"{_COCO}/000000077595.jpg",
    "000000136466.jpg": f"{_COCO}/000000136466.jpg",
    "truck.jpg": f"{_FIXTURES}/truck.jpg",
    "groceries.jpg": f"{_FIXTURES}/groceries.jpg",
    "dog-sam.png": f"{_DOCUMENTATION}/dog-sam.png",
}
(BEDROOM,) = VIDEOS = {"bedroom.mp4": f"{_FIXTURES}/bedroom.mp4"}


class Concept(NamedTuple):
    """One published concept prompt. Boxes are positive, in pixels."""

    picture: str
    text: str | None
    boxes: tuple[tuple[int, int, int, int], ...]
    beside_box: bool  # published from a batch in which another prompt had a box
    threshold: float
    figures: ConceptFigures


def figures(logits, box, corner, score, pixel_box) -> ConceptFigures:
    return ConceptFigures(*map(np.array, (logits, box, corner, score, pixel_box)))


CONCEPTS = {
    "ear": Concept(
        *(CAT, "ear", (), False, 0.5),
        figures(
            [2.7182, 2.4618, -2.3020],
            [0.4704, 0.2014, 0.5615, 0.3770],
            [
                [-2.1815, -6.2767, -7.0687],
                [-5.7988, -10.2704, -10.9379],
                [-8.5194, -10.7892, -9.9152],
            ],
            0.9210,
            [402.1755, 90.1420, 459.6165, 156.3702],
        ),
    ),
    "box": Concept(
        *(CAT, None, ((100, 150, 500, 450),), False, 0.5),
        figures(
            [2.5988, -1.6460, -1.8699],
            [0.1631, 0.4140, 0.7510, 0.9931],
            [[-1.8726, -3.5063, -3.7716], [-3.1987, -5.3820, -5.6782], [-3.8850, -5.4164, -5.8604]],
            0.9307,
            [104.3945, 175.9433, 480.6293, 422.0826],
        ),
    ),
    "laptop": Concept(
        *(CAT, "laptop", (), True, 0.3),
        figures(
            [3.6865, -1.8555, -2.5854],
            [-0.0013, 0.0016, 0.4521, 0.9964],
            [[0.0520, 0.3121, 0.4103], [0.6820, 1.0069, 1.0949], [0.8418, 1.0318, 1.0365]],
            0.9655,
            [-0.8481, 0.6668, 289.3758, 423.4723],
        ),
    ),
    "two boxes": Concept(
        *(KITCHEN, None, ((59, 144, 76, 163), (87, 148, 104, 159)), False, 0.5),
        figures(
            [3.2071, 2.7154, 1.6198],
            [0.1757, 0.2888, 0.2296, 0.3259],
            [
                [-8.6138, -14.5615, -17.9965],
                [-13.6695, -20.4994, -25.6705],
                [-14.9681, -23.0616, -17.0045],
            ],
            0.9379,
            [86.8687, 147.5269, 104.4475, 159.6138],
        ),
    ),
    "dial": Concept(
        *(KITCHEN, "dial", (), False, 0.3),
        figures(
            [2.0534, 2.0395, 2.0320],
            [0.6162, 0.2769, 0.6838, 0.3238],
            [
                [-7.4371, -13.5898, -13.6496],
                [-11.8669, -20.6416, -23.0941],
                [-12.8623, -20.3439, -16.6497],
            ],
            0.6641,
            [110.6279, 271.1848, 137.3600, 301.3683],
        ),
    ),
    "small box": Concept(
        *(KITCHEN, None, ((59, 144, 76, 163),), False, 0.3),
        figures(
            [3.4183, 1.5929, 1.5315],
            [0.1774, 0.2876, 0.2296, 0.3261],
            [
                [-8.7447, -14.3499, -17.5662],
                [-13.6804, -20.3728, -25.5098],
                [-15.2996, -22.9116, -17.6658],
            ],
            0.8222,
            [168.9376, 137.3257, 191.7281, 161.3243],
        ),
    ),
}

POINT = {"points": [[500, 375]], "labels": [1]}
TRUCK_POINT = ClickFigures(
    np.array([0.9106, 0.5326, 0.0379]),
    np.array(
        [
            [-18.9093, -31.1757, -23.6851],
            [-20.3388, -31.0213, -29.8815],
            [-20.7554, -29.4530, -30.1776],
        ]
    ),
)
TRUCK_SINGLE = ClickFigures(
    np.array([0.9474]),
    np.array(
        [[-8.1500, -12.3282, -9.6828], [-9.0512, -11.6470, -11.6363], [-9.2391, -11.9863, -12.4858]]
    ),
)
DOG_POINTS = {"points": [[770, 200], [730, 120]], "labels": [1, 0]}
DOG_FIGURES = ClickFigures(
    np.array([0.7675, 0.7505, 0.5348]),
    np.array(
        [
            [-10.3051, -9.9056, -10.5699],
            [-8.8009, -11.1684, -10.7158],
            [-9.6653, -10.9755, -10.3231],
        ]
    ),
)
# The best mask of POINT with a second point of this label: figures of the single output.
REFINED = {
    1: ClickFigures(
        np.array([0.9809]),
        np.array(
            [[-5.3111, -7.4920, -5.5444], [-4.7685, -6.3513, -6.2969], [-4.8471, -5.1722, -6.5492]]
        ),
    ),
    0: ClickFigures(
        np.array([0.9625]),
        np.array(
            [
                [-13.4726, -19.9250, -16.3620],
                [-13.5886, -18.7266, -17.6766],
                [-14.6962, -19.3814, -19.9888],
            ]
        ),
    ),
}
BOX_CLICKS = [  # picture, box, IoU, first logit of the single output
    (TRUCK, [75, 275, 1725, 850], 0.9862, -12.5972),
    (TRUCK, [425, 600, 700, 875], 0.9666, -20.2715),
    (TRUCK, [1375, 550, 1650, 800], 0.9588, -20.9112),
    (TRUCK, [1240, 675, 1400, 750], 0.9331, -23.6995),
    (GROCERIES, [450, 170, 520, 350], 0.9757, -21.7436),
    (GROCERIES, [350, 190, 450, 350], 0.9838, -28.0691),
    (GROCERIES, [500, 170, 580, 350], 0.9785, -25.3085),
    (GROCERIES, [580, 170, 640, 350], 0.9755, -26.7339),
]


class Followed(NamedTuple):
    """A published object of :data:`BEDROOM`: mask logits at the video's size, 540 x 960 pixels."""

    prompt: dict[str, list]  # on frame 0: points, labels, box
    corner: np.ndarray  # first rows and columns on frame 0
    later: np.ndarray  # (2, 2): first two rows of column 0 on frames 1 and 2


def followed(prompt: dict[str, list], corner: list, later: list) -> Followed:
    return Followed(prompt, np.array(corner), np.array(later))


FOLLOWED = {
    "point": followed(
        {"points": [[210, 350]], "labels": [1]},
        [
            [-13.5762, -13.5762, -13.7167],
            [-13.0870, -13.0870, -13.5405],
            [-12.2173, -12.2173, -13.2273],
        ],
        [[-19.1203, -19.5488], [-19.9951, -20.5353]],
    ),
    "two points": followed(
        {"points": [[210, 350], [250, 220]], "labels": [1, 1]},
        [
            [-11.9889, -11.9889, -12.2238],
            [-11.6383, -11.6383, -12.0873],
            [-11.0150, -11.0150, -11.8446],
        ],
        [[-20.4502, -20.6929], [-22.0344, -22.4522]],
    ),
    # Published beside an object of one point, which the padding of its prompt changed.
    "three points": followed(
        {"points": [[200, 300], [230, 250], [275, 175]], "labels": [1, 1, 0]},
        [[-12.8567, -12.8567], [-13.0618, -13.0618]],
        [[-22.5194, -22.7973], [-25.0871, -25.6355]],
    ),
    "box": followed(
        {"box": [300, 0, 500, 400]},
        [
            [-17.2589, -17.2589, -17.5130],
            [-17.2777, -17.2777, -17.9154],
            [-17.3111, -17.3111, -18.6309],
        ],
        [[-17.8107, -18.1581], [-17.9432, -18.4637]],
    ),
    "other box": followed(
        {"box": [400, 0, 600, 400]},
        [[-8.5523, -8.5523], [-8.5103, -8.5103]],
        [[-9.1150, -9.2327], [-10.9026, -11.0184]],
    ),
    "box and point": followed(
        {"box": [300, 0, 500, 400], "points": [[460, 60]], "labels": [1]},
        [
            [-14.0206, -14.0206, -14.1225],
            [-14.0568, -14.0568, -14.4570],
            [-14.1212, -14.1212, -15.0516],
        ],
        [[-16.8155, -17.2954], [-16.2909, -16.8887]],
    ),
}
# The mask that "two points" gives, as a mask prompt.
MASK_FOLLOWED = followed({}, np.full((3, 3), -10.0), [[-21.3700, -21.7191], [-22.2242, -22.7148]])


class PhraseFrame(NamedTuple):
    """What is published of a frame of :data:`BEDROOM` when a phrase is followed."""

    box: np.ndarray  # (4,) of object 0: its first and last pixels
    corner: np.ndarray  # (3, 3) first rows and columns of its logits at low resolution


class PhraseFigures(NamedTuple):
    """What is published of "person": two objects, 0 and 1, on every frame."""

    scores: np.ndarray  # (2,)
    frames: dict[int, PhraseFrame]


PERSON = {  # by the device on which transformers resized the frames
    "cpu": PhraseFigures(
        np.array([0.968648, 0.973611]),
        {
            0: PhraseFrame(
                np.array([146, 135, 291, 404]),
                np.array(
                    [
                        [-2.9523, -5.9463, -7.9912],
                        [-6.9169, -10.0586, -11.1146],
                        [-8.1956, -9.7876, -10.3927],
                    ]
                ),
            ),
            3: PhraseFrame(
                np.array([157, 116, 295, 382]),
                np.array(
                    [
                        [-23.0233, -27.0289, -22.2999],
                        [-24.3732, -31.4284, -24.2688],
                        [-24.5500, -32.6074, -26.5009],
                    ]
                ),
            ),
        },
    ),
    "cuda": PhraseFigures(  # of a stream
        np.array([0.968394, 0.974018]),
        {
            0: PhraseFrame(
                np.array([146, 135, 291, 404]),
                np.array(
                    [
                        [-2.9876, -5.9449, -7.9739],
                        [-7.0174, -10.0880, -11.0893],
                        [-8.2745, -9.8515, -10.4289],
                    ]
                ),
            ),
            2: PhraseFrame(
                np.array([154, 117, 294, 395]),
                np.array(
                    [
                        [-23.9355, -27.9670, -23.5199],
                        [-25.7424, -32.6505, -24.7121],
                        [-25.2632, -33.8071, -27.4638],
                    ]
                ),
            ),
        },
    ),
}

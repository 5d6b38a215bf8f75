"""The demo's figures: what is asked, and that answers of known quality get the right figures."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from sam3_jax.data.masks import mask_box
from sam3_jax.data.records import Answer, Dataset, Instance, Problems, Record
from sam3_jax.demo import asking, figures, held_out
from sam3_jax.demo.layout import SceneConfig
from sam3_jax.demo.phrases import Query
from sam3_jax.demo.render import visible_masks
from sam3_jax.demo.scene import objects_of
from sam3_jax.inference.image import ImagePredictor
from sam3_jax.inference.postprocess import ClickResult, Detections

COUNTS = {"test": 3, "unseen": 2}
FIRST = 1  # click hypotheses: the favourite is not the first


def words(phrase: str) -> Query:
    """The query that a phrase came from."""
    values = asking.COLORS, figures_textures(), ("small", "large")
    parts = dict.fromkeys(("color", "texture", "size", "shape"))
    for word in phrase.split():
        kinds = (k for k, v in zip(("color", "texture", "size"), values, strict=True) if word in v)
        parts[next(kinds, "shape")] = word if word != "object" else None
    return Query(**parts)


def figures_textures() -> tuple[str, ...]:
    return ("striped", "dotted", "checkered")


class Knowing(ImagePredictor):
    """Answers rightly, because it has seen how the pictures were drawn."""

    def __init__(self, folder):
        self.scenes = {}
        for split, count in COUNTS.items():
            for index in range(count):
                objects = objects_of(SceneConfig(), split, index)
                file = folder / split / f"{split}_{index:05d}.png"
                key = np.asarray(Image.open(file)).tobytes()
                self.scenes[key] = objects, visible_masks(objects, 256)
        self.asked_by_box = []

    @property
    def dtype(self):
        return np.dtype("float32")

    def set_image(self, image):
        self.objects, self.masks = self.scenes[np.asarray(image).tobytes()]

    def predict_many(self, prompts, threshold=0.5, **_):
        return [self.detections(prompt) for prompt in prompts]

    def detections(self, prompt) -> Detections:
        query = prompt.text and words(prompt.text)
        if not query:
            (box,) = prompt.boxes
            self.asked_by_box.append(box)
            (number,) = (i for i, m in enumerate(self.masks) if xyxy(m) == box)
            query = Query(color=self.objects[number].color, shape=self.objects[number].shape)
        masks = self.masks[list(query.answers(self.objects))]
        n = len(masks)
        return Detections(masks, np.zeros((n, 4), np.float32), np.full(n, 0.9, np.float32))

    def predict_points(self, points, labels, **_) -> ClickResult:
        column, row = (int(v) for v in points[0])
        (mask,) = self.masks[self.masks[:, row, column]]
        return guesses(mask)


class Blind(Knowing):
    """Finds the whole picture, whatever is asked."""

    def detections(self, prompt) -> Detections:
        whole = np.ones((1, 256, 256), bool)
        return Detections(whole, np.zeros((1, 4), np.float32), np.ones(1, np.float32))

    def predict_points(self, points, labels, **_) -> ClickResult:
        return guesses(np.zeros((256, 256), bool))


def guesses(mask: np.ndarray) -> ClickResult:
    """Three hypotheses, of which the second is the favourite; their logits tell them apart."""
    masks = np.stack([~mask, mask, ~mask])
    logits = np.arange(3, dtype=np.float32)[:, None, None] + np.zeros((3, 4, 4), np.float32)
    return ClickResult(masks, np.array([0.1, 0.8, 0.2], np.float32), logits)


def xyxy(mask: np.ndarray) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1.0, rows[-1] + 1.0


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The first pictures of the held-out sets."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in COUNTS.items():
        held_out.write_split(folder / split, split, count)
    return folder


@pytest.fixture
def command(monkeypatch, data):
    """The command on a predictor instead of a checkpoint."""

    def call(predictor, *arguments) -> int:
        monkeypatch.setattr(ImagePredictor, "from_pretrained", lambda path: predictor)
        return figures.main(["somewhere", str(data), *map(str, arguments)])

    return call


def test_right_answers_reach_every_goal(command, data, tmp_path, capsys):
    predictor = Knowing(data)
    assert command(predictor, "--output", tmp_path / "f.json") == 0
    out, err = capsys.readouterr()
    assert out.count("reached") == 6
    assert "missed" not in out
    assert "is not the published set" in err  # a part of it
    content = json.loads((tmp_path / "f.json").read_text())
    found = content["figures"]
    for kind, names in (
        ("text", ("cgF1", "pmF1", "IL_MCC")),
        ("unseen", ("cgF1", "pmF1", "IL_MCC")),
        ("exemplar", ("cgF1", "pmF1", "IL_MCC")),
        ("clicks", ("mIoU_1", "mIoU_2", "mIoU_3")),
    ):
        # cgF1's guards against division by zero cost some 1e-4.
        assert [found[kind][n] for n in names] == pytest.approx([1.0] * 3, abs=1e-3)
    assert content["goals"] == {
        "text": {"cgF1": 0.75, "IL_MCC": 0.9},
        "unseen": {"cgF1": 0.55},
        "exemplar": {"cgF1": 0.6},
        "clicks": {"mIoU_1": 0.85, "mIoU_3": 0.9},
    }
    assert content["info"]["published_sets"] == {"test": False, "unseen": False}
    pictures = [found[kind]["pictures"] for kind in ("text", "unseen")]
    assert pictures == list(COUNTS.values())
    assert predictor.asked_by_box
    assert len(set(predictor.asked_by_box)) == found["exemplar"]["positive_pairs"]


def test_wrong_answers_reach_none(command, data, capsys):
    assert command(Blind(data), "--limit", "1") == 0
    out = capsys.readouterr().out
    assert out.count("missed") == 6
    assert "1 pictures with 12 pairs and 1 with" in out
    assert "a part of the sets" in out


def test_command_says_what_is_missing(command, data, tmp_path, capsys):
    assert figures.main([str(tmp_path / "none"), str(data)]) == 2
    assert "no such folder" in capsys.readouterr().err
    command(Knowing(data), "--output", tmp_path / "no" / "f.json")
    assert "cannot write the figures" in capsys.readouterr().err
    predictor = Knowing(data)
    with pytest.raises(figures.AnnotationError, match="sam3_jax.demo.dataset .* --train 0 makes"):
        figures.measure_demo(predictor, tmp_path)


def strip(start: int, stop: int) -> np.ndarray:
    """Columns of a picture of 10 x 100 pixels."""
    mask = np.zeros((10, 100), bool)
    mask[:, start:stop] = True
    return mask


def instance(start: int, stop: int) -> Instance:
    rle = coco_mask.encode(np.asfortranarray(strip(start, stop), np.uint8))
    return Instance(mask_box(rle), rle, float(10 * (stop - start)))


def dataset(**phrases: list[Instance]) -> Dataset:
    """Pairs of one picture, keyed by their phrase."""
    records = []
    for name, found in phrases.items():
        phrase = name.replace("_", " ")
        file = "b.png" if phrase == "seven" else "a.png"
        answers = (Answer(tuple(found), True, True),)
        records.append(Record((phrase,), 1, 1, file, (10, 100), phrase, answers))
    return Dataset("saco", records, True, Problems(), [], [], {})


TRUTH = {
    "red_circle": [instance(0, 10), instance(20, 40)],
    "blue_ring": [instance(50, 70)],
    "green_star": [],
    "red_ring": [],
    "seven": [instance(0, 10)],
}


def test_figures_are_those_computed_by_hand():
    text = {
        ("red circle",): [instance(0, 10)],  # one of two
        ("blue ring",): [instance(50, 62)],  # IoU .6: right at .50, .55 and .60
        ("green star",): [instance(0, 5)],  # is not there
        ("seven",): [instance(0, 10)],
    }
    by_box = {("red circle",): list(TRUTH["red_circle"]), ("blue ring",): [instance(50, 70)]}
    answers = asking.Answers(text, by_box, [[0.5, 0.7, 0.9], [0.7, 0.8, 1.0]])
    found = figures.figures_of(dataset(**TRUTH), answers)
    # Of 4 targets 3 are found at three thresholds, 2 at seven; 3 predictions in positive pairs.
    precisions, recalls = [3 / 3] * 3 + [2 / 3] * 7, [3 / 4] * 3 + [2 / 4] * 7
    f1 = [2 * p * r / (p + r) for p, r in zip(precisions, recalls, strict=True)]
    assert found["text"]["pmF1"] == pytest.approx(np.mean(f1), abs=1e-3)  # guards, as above
    # 3 right "something", 1 wrong, 1 right "nothing".
    mcc = (3 * 1 - 1 * 0) / np.sqrt(4 * 3 * 2 * 1)
    assert found["text"]["IL_MCC"] == pytest.approx(mcc, abs=1e-6)
    assert found["text"]["cgF1"] == pytest.approx(mcc * np.mean(f1), abs=1e-3)
    assert (found["text"]["pairs"], found["text"]["positive_pairs"]) == (5, 3)
    # By box both are found; one negative of two is wrong, with its text; "seven" is not asked.
    mcc = (2 * 1 - 1 * 0) / np.sqrt(3 * 2 * 2 * 1)
    assert found["exemplar"]["cgF1"] == pytest.approx(mcc, abs=1e-3)
    assert (found["exemplar"]["pairs"], found["exemplar"]["positive_pairs"]) == (4, 2)
    wanted = {"objects": 2, "mIoU_1": 0.6, "mIoU_2": 0.75, "mIoU_3": 0.95}
    assert found["clicks"] == pytest.approx(wanted)


def test_duplicates_are_counted_and_left_out():
    once = {key: list(value) for key, value in TRUTH.items()}
    found = {(name.replace("_", " "),): value for name, value in once.items()}
    better, worse = found["red circle",][0]._replace(score=0.9), instance(1, 10)
    apart = instance(7, 12)  # IoU 3/12 with the first: another object
    found["red circle",] = [worse._replace(score=0.6), better, apart._replace(score=0.7)]
    kept = asking.distinct(found)
    assert [i.score for i in kept["red circle",]] == [0.9, 0.7]
    assert kept["seven",] == found["seven",]
    values = figures.figures_of(dataset(**TRUTH), asking.Answers(found, {}, []))["text"]
    # Of 4 targets 3 are found, by 5 answers or by 4.
    assert values["pmF1"] == pytest.approx(2 * 3 / (4 + 5), abs=1e-3)
    assert values["pmF1_distinct"] == pytest.approx(2 * 3 / (4 + 4), abs=1e-3)
    assert values["cgF1_distinct"] == pytest.approx(values["IL_MCC"] * 6 / 8, abs=1e-3)


def test_without_clicks_there_is_a_dash():
    answers = asking.Answers({}, {}, [])
    found = figures.figures_of(dataset(**TRUTH), answers) | {"unseen": {}}
    (line,) = (x for x in figures.table_of(found).splitlines() if "1 click:" in x)
    assert "| " + "-".rjust(8) in line


def test_exemplars_are_the_largest_targets_of_colours_with_shapes():
    prompts = asking.exemplar_prompts(dataset(**TRUTH).records)
    assert prompts[("red circle",)].boxes == [(20, 0, 40, 10)]
    assert list(prompts) == [("red circle",), ("blue ring",)]
    asked = {"small_red_circle": TRUTH["red_circle"], "blue_object": TRUTH["blue_ring"]}
    assert not asking.exemplar_prompts(dataset(**asked).records)


def test_objects_to_click_on_come_from_different_pictures():
    truth = TRUTH | {"circle": [TRUTH["red_circle"][0], instance(80, 90)]}
    first, second, third, *_ = truth["red_circle"] + truth["circle"][1:]
    assert asking.click_targets(dataset(**truth), 2) == {
        "a.png": [first],
        "b.png": truth["seven"],
    }
    own = asking.click_targets(dataset(**truth), 9)
    assert own["a.png"] == [first, second, truth["blue_ring"][0], third]  # each once


class Slow(ImagePredictor):
    """Needs corrections; keeps what it was asked."""

    def __init__(self):
        self.asked = []
        self.plan = [strip(10, 30), strip(10, 90), strip(10, 50)]

    def predict_points(self, points, labels, mask_input=None, multimask=True):
        shown = None if mask_input is None else float(mask_input.mean())
        self.asked.append(([tuple(p) for p in points], list(labels), shown, multimask))
        found = guesses(self.plan[len(points) - 1])
        return found if multimask else ClickResult(*(field[1:2] for field in found))


def test_a_session_of_clicks():
    predictor = Slow()
    ious = asking.click_ious(predictor, strip(10, 50))
    assert ious == [0.5, 0.5, 1.0]
    first, second, third = predictor.asked
    (centre,) = first[0]
    assert first[1:] == ([1], None, True)
    assert strip(14, 46)[int(centre[1]), int(centre[0])]  # not nearer to the ends than to a side
    assert centre[1] in (4.5, 5.5)
    missed = second[0][1]
    assert second[1:] == ([1, 1], FIRST, False)  # the favourite's logits come back
    assert strip(34, 46)[int(missed[1]), int(missed[0])]
    extra = third[0][2]
    assert third[1:] == ([1, 1, 0], FIRST, False)
    assert strip(54, 86)[int(extra[1]), int(extra[0])]

"""Data sets are written and read without TensorFlow, and say what is wrong with their sources."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import shuffle

import data_sets
from sam3_jax.data.builder import Source, digest_of, prepare
from sam3_jax.data.images import ImageError
from sam3_jax.data.pictures import decode_as_annotated
from sam3_jax.data.records import AnnotationError
from sam3_jax.data.source import open_split

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    data_sets.write_pictures(tmp_path)
    return tmp_path


def test_coco_comes_back_as_it_was(photos):
    file = data_sets.write_json(photos / "a.json", data_sets.coco())
    folder = prepare({"train": Source(file), "val": Source(file)}, photos / "out", "small")
    source = pickle.loads(pickle.dumps(open_split(folder, "train")))  # as it goes to workers
    assert len(source) == len(open_split(folder, "val")) == 3
    assert source.vocabulary.closed
    assert source.vocabulary.phrases[:2] == ("face", "Cup")
    scenes = {scene.picture.image_id: scene for scene in (source[i] for i in range(3))}
    assert scenes["11"].data == (photos / "cup.jpg").read_bytes()
    assert scenes["11"].picture.size == (80, 120)
    cup, saucer = scenes["11"].pairs
    assert (cup.phrase, cup.pair_id, cup.exhaustive) == ("Cup", "11/2", True)
    assert [(i.id, i.crowd) for i in cup.instances] == [("101", False), ("102", True)]
    assert cup.instances[0].box == (30, 16, 50, 40)
    original = data_sets.coco()["annotations"][3]["segmentation"]
    assert saucer.instances[0].rle["counts"].decode() == original["counts"]


def test_tfds_reads_it_by_itself(photos):
    file = data_sets.write_json(photos / "a.json", data_sets.coco())
    folder = prepare({"train": Source(file)}, photos / "out", "small")
    data = tfds.builder_from_directory(str(folder)).as_data_source("train")
    shapes = sorted(example["image"].shape for example in data)
    assert shapes == [(80, 120, 3), (90, 136, 3), (96, 96, 3)]


def test_saco_pairs_of_a_picture_are_together(photos):
    file = data_sets.write_json(photos / "a.json", data_sets.saco())
    folder = prepare({"train": Source(file)}, photos / "out", "saco")
    source = open_split(folder, "train")
    cat = next(s for s in (source[0], source[1]) if s.picture.file_name == "cat.png")
    assert [(p.phrase, len(p.instances), p.exhaustive) for p in cat.pairs] == [
        ("striped cat", 1, True),
        ("dog", 0, True),
        ("whisker", 0, False),
    ]
    assert cat.pairs[0].instances[0].box == pytest.approx((20, 10, 60, 70))
    assert not source.vocabulary.closed


def test_roboflow_folder_with_and_without_masks(photos):
    data = data_sets.coco()
    data["annotations"][0]["segmentation"] = []
    del data["annotations"][1]["segmentation"]
    data["categories"].append({"id": 9, "name": "CUP", "supercategory": "dish"})
    data["annotations"].append({**data["annotations"][3], "id": 300, "category_id": 9})
    data_sets.write_json(photos / "_annotations.coco.json", data)
    folder = prepare({"train": Source(photos)}, photos / "out", "robo")
    source = open_split(folder, "train")
    face = next(s for s in (source[i] for i in range(3)) if s.picture.image_id == "10")
    assert face.pairs[0].instances[0].rle is None
    # Phrases that the tokenizer cannot tell apart are one.
    cup = next(s for s in (source[i] for i in range(3)) if s.picture.image_id == "11").pairs[0]
    assert [i.rle is None for i in cup.instances] == [True, False, False]
    assert cup.pair_id == "11/2+11/9"
    assert len(source.vocabulary.phrases) == len(data_sets.CATEGORIES)


def test_without_tensorflow(photos):
    file = data_sets.write_json(photos / "a.json", data_sets.coco())
    program = f"""
import sys
class Hide:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        hidden = name.split(".")[0] in ("tensorflow", "torch", "importlib_resources")
        return None if hidden else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
from pathlib import Path
from sam3_jax.data.builder import Source, prepare
from sam3_jax.data.source import open_split
folder = prepare({{"train": Source(Path({str(file)!r}))}}, Path({str(photos)!r}) / "out", "x")
print(sum(len(p.instances) for s in map(open_split(folder, "train").__getitem__, range(3))
          for p in s.pairs), "jax" in sys.modules)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-2:] == ["6", "False"]  # nor jax: reading starts at once


def test_more_than_fits_into_memory(photos, monkeypatch):
    """Above a gigabyte TFDS shuffles through temporary files, which are TensorFlow's by default."""
    file = data_sets.write_json(photos / "a.json", data_sets.coco())
    within = prepare({"train": Source(file)}, photos / "out", "within")
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 100)
    beyond = prepare({"train": Source(file)}, photos / "out", "beyond")
    first, second = open_split(within, "train"), open_split(beyond, "train")
    assert [first[i] for i in range(3)] == [second[i] for i in range(3)]
    assert not list(beyond.glob("*.tmp"))


def test_bad_entries_are_counted_by_id_and_left_out(photos, capsys):
    data = data_sets.coco()
    bad = {
        "unknown category": {"category_id": 99},
        "box outside the image": {"bbox": [300, 3, 5, 5]},
        "box of zero area": {"bbox": [3, 3, 0, 5]},
        "polygon of fewer than three points": {"segmentation": [[1, 1, 5, 5]]},
        "broken run-length encoding": {"segmentation": {"size": [96, 96], "counts": "zz~"}},
        "duplicate annotation id": {"id": 100},
    }
    for number, change in enumerate(bad.values()):
        data["annotations"].append({**data["annotations"][0], "id": 200 + number, **change})
    data["categories"].append({"id": 50, "name": " "})
    for number, name in ((13, "gone.png"), (14, "cut.png"), (15, "cat.png")):
        data["images"].append({"id": number, "file_name": name, "height": 96, "width": 96})
    (photos / "cut.png").write_bytes((photos / "face.png").read_bytes()[:400])
    file = data_sets.write_json(photos / "a.json", data)
    folder = prepare({"train": Source(file)}, photos / "out", "x", max_bad=0.7)
    written = json.loads((folder / "metadata.json").read_text())["splits"]["train"]["problems"]
    expected = {kind: [f"annotation {200 + n}"] for n, kind in enumerate(bad)}
    expected["duplicate annotation id"] = ["annotation 100"]
    expected["empty phrase"] = ["category 50"]
    expected["missing picture"] = ["image 13 gone.png"]
    expected["unusable picture"] = ["image 14 cut.png", "image 15 cat.png"]
    assert written == expected
    err = capsys.readouterr().err
    assert "cut.png: cannot be decoded" in err
    assert "is 136 x 90 pixels, its annotations are for 96 x 96" in err
    assert "empty phrase: 1 (category 50)" in err
    source = open_split(folder, "train")
    assert len(source) == 3
    face = next(s for s in (source[i] for i in range(3)) if s.picture.image_id == "10")
    assert not face.pairs[0].exhaustive  # a lost instance must not teach "there is nothing"


def test_too_much_damage_stops(photos):
    file = data_sets.write_json(photos / "a.json", data_sets.coco())
    sources = {"train": Source(file)}
    (photos / "cat.png").unlink()
    with pytest.raises(AnnotationError, match=r"1 of 3 .*\n.*missing picture: 1 \(image 12 cat"):
        prepare(sources, photos / "out", "x")
    (photos / "cat.png").write_bytes(b"")
    with pytest.raises(AnnotationError, match="unusable picture: 1"):
        prepare(sources, photos / "out", "x")
    data = data_sets.coco()
    data["annotations"][0]["category_id"] = data["annotations"][1]["category_id"] = 99
    data_sets.write_json(file, data)
    with pytest.raises(AnnotationError, match="unknown category: 2"):
        prepare(sources, photos / "out", "x")
    data_sets.write_json(file, data_sets.coco(annotations=[]))
    with pytest.raises(AnnotationError, match="no usable image-phrase pair"):
        prepare(sources, photos / "out", "x")
    data_sets.write_json(file, data_sets.coco(annotations=data_sets.coco()["annotations"][4:]))
    with pytest.raises(AnnotationError, match="no picture with a target"):  # cat.png is empty
        prepare(sources, photos / "out", "x", max_bad=0.5)
    with pytest.raises(AnnotationError, match="holds no data set"):  # nothing half-written
        open_split(photos / "out" / "concepts" / "x" / "1.0.0", "train")


def test_a_data_set_is_found_again_and_another_is_not_mistaken_for_it(photos):
    file = data_sets.write_json(photos / "a.json", data_sets.coco())
    source = Source(file)
    folder = prepare({"train": source}, photos / "out", "x")
    changed = (folder / "dataset_info.json").stat().st_mtime_ns
    assert prepare({"train": source}, photos / "out", "x") == folder
    assert (folder / "dataset_info.json").stat().st_mtime_ns == changed
    data = data_sets.coco()
    del data["annotations"][-1]
    data_sets.write_json(file, data)
    with pytest.raises(AnnotationError, match="was written from other annotations"):
        prepare({"train": source}, photos / "out", "x")
    prepare({"train": source}, photos / "out", "x", overwrite=True)
    cats = [len(p.instances) for p in _all_pairs(folder) if p.phrase == "cat"]
    assert cats == [1]
    with pytest.raises(AnnotationError, match="no split named 'test'; it has train"):
        open_split(folder, "test")
    with pytest.raises(AnnotationError, match="cannot be read"):
        digest_of(Source(photos / "none.json"))


def _all_pairs(folder: Path) -> list:
    source = open_split(folder, "train")
    return [pair for i in range(len(source)) for pair in source[i].pairs]


def test_orientation_is_that_of_the_annotations(rng):
    stored = rng.integers(0, 255, (20, 40, 3), np.uint8)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    file = io.BytesIO()
    PIL.Image.fromarray(stored).save(file, "PNG", exif=exif)
    data = file.getvalue()
    np.testing.assert_array_equal(decode_as_annotated(data, "x", (20, 40)), stored)
    np.testing.assert_array_equal(decode_as_annotated(data, "x", (40, 20)), np.rot90(stored, -1))
    with pytest.raises(ImageError, match="x: is 40 x 20 pixels"):
        decode_as_annotated(data, "x", (30, 30))
    with pytest.raises(ImageError, match="x: the file is empty"):
        decode_as_annotated(b"", "x", (30, 30))

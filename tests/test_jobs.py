"""Work lists: job files with every kind of mistake, patterns and folders, names of outputs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from sam3_jax.inference import files, jobs
from sam3_jax.inference.files import UsageError
from sam3_jax.inference.jobs import BadLine, Job, JobError, make_job, read_jobs


def one(folder: Path, line: str | bytes) -> Job | BadLine:
    """What a job file with this one line holds."""
    path = folder / "jobs.jsonl"
    path.write_bytes(line if isinstance(line, bytes) else line.encode())
    (found,) = read_jobs(path)
    return found


def test_the_example_of_the_documentation_is_read(tmp_path):
    lines = [line.strip() for line in jobs.__doc__.splitlines() if line.startswith("    ")]
    assert len(lines) == 7
    path = tmp_path / "jobs.jsonl"
    path.write_text("\ufeff" + "\r\n\r\n".join(lines), encoding="utf-8")  # as Windows writes it
    a, b, c, d, e, f = read_jobs(path)
    assert a.image == tmp_path / "a.jpg"
    assert a.phrases == ("cat", "red car")
    assert a.threshold == 0.4
    assert (b.boxes, b.box_labels) == (((9, 8, 60, 90),), (0,))
    assert c.box_labels == (1, 1)
    assert (d.points, d.point_labels) == (((320, 200), (10, 10)), (1, 0))
    assert e.image == tmp_path / "sub" / "e.png"
    assert e.object_box == (30, 20, 400, 300)
    assert (f.image, f.frame, e.frame) == (tmp_path / "clip.mp4", 12, None)
    assert [job.about_object for job in (a, b, c, d, e, f)] == [False] * 3 + [True] * 3


def test_keys_are_stable_and_tell_jobs_apart(tmp_path):
    same = make_job("x/a.jpg", phrases=["cat"])
    assert same.key == make_job("x/a.jpg", phrases=("cat", "cat"), folder=tmp_path).key
    assert same.key == "x/a.jpg#1ab65808f93a"  # results on disk depend on it: never changes
    kinds = [
        {"phrases": ["cat"], "threshold": 0.5},
        {"phrases": ["cat", "dog"]},
        {"phrases": ["cat"], "boxes": [[1, 2, 3, 4]]},
        {"phrases": ["cat"], "boxes": [[1, 2, 3, 4]], "box_labels": [0]},
        {"points": [[1, 2]]},
        {"object_box": [1, 2, 3, 4]},
        {"mask_prompt": "m.png"},
    ]
    keys = {same.key, *(make_job("x/a.jpg", **kind).key for kind in kinds)}
    assert len(keys) == len(kinds) + 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a.jpg", "phrases": ["c"]', "not a JSON object"),
        ("[1, 2]", "not a JSON object"),
        ("[" * 100_000, "nested too deeply"),
        (b'{"image": "\xe9.jpg"}', "not UTF-8 (byte 0xe9 at 12)"),
        ('{"phrases": ["cat"]}', 'no "image"'),
        ('{"image": "", "phrases": ["cat"]}', "image must be a path"),
        ('{"image": "a\\u0000.jpg", "phrases": ["cat"]}', "image must be a path"),
        ('{"image": "a.jpg"}', "no prompt"),
        ('{"image": "a.jpg", "phrase": ["cat"]}', "did you mean 'phrases'?"),
        ('{"image": "a.jpg", "zzz": 1}', "known are image, phrases"),
        ('{"image": "a.jpg", "key": "b"}', "unknown key 'key'"),
        ('{"image": "a.jpg", "image": "b.jpg"}', "'image' is there twice"),
        ('{"image": "a.jpg", "phrases": "cat"}', "must be a list of texts"),
        ('{"image": "a.jpg", "phrases": ["cat", " "]}', "phrases has ' '"),
        ('{"image": "a.jpg", "phrases": [7]}', "phrases has 7"),
        ('{"image": "a.jpg", "boxes": [1, 2, 3, 4]}', "boxes: 1 is not [x0, y0, x1, y1]"),
        ('{"image": "a.jpg", "boxes": [[1, 2, 3]]}', "is not [x0, y0, x1, y1]"),
        ('{"image": "a.jpg", "boxes": [[1, 2, NaN, 4]]}', "is not [x0, y0, x1, y1]"),
        ('{"image": "a.jpg", "boxes": [[1, 2, 1e999, 4]]}', "is not [x0, y0, x1, y1]"),
        ('{"image": "a.jpg", "boxes": [[1, 2, "3", 4]]}', "is not [x0, y0, x1, y1]"),
        ('{"image": "a.jpg", "boxes": [[9, 2, 3, 4]]}', "must have x0 < x1"),
        ('{"image": "a.jpg", "object_box": [1, 2, 1, 2]}', "must have x0 < x1"),
        ('{"image": "a.jpg", "boxes": [[1, 2, 3, 4]], "box_labels": [1, 0]}', "list of 1 values"),
        ('{"image": "a.jpg", "boxes": [[1, 2, 3, 4]], "box_labels": [2]}', "must be 1"),
        ('{"image": "a.jpg", "boxes": [[1, 2, 3, 4]], "box_labels": [true]}', "must be 1"),
        ('{"image": "a.jpg", "phrases": ["c"], "point_labels": [1]}', "list of 0 values"),
        ('{"image": "a.jpg", "points": [[1, 2, 3]]}', "is not [x, y]"),
        ('{"image": "a.jpg", "phrases": ["c"], "threshold": 2}', "number from 0 to 1"),
        ('{"image": "a.jpg", "phrases": ["c"], "points": [[1, 2]]}', "use one kind, or two jobs"),
        ('{"image": "a.jpg", "object_box": [1, 2, 3, 4], "threshold": 0.5}', "use one kind"),
        ('{"image": "a.jpg", "phrases": ["c"], "schema_version": 2}', "schema_version is 2"),
    ],
)
def test_a_bad_line_is_explained_and_does_not_end_the_job(tmp_path, line, message):
    data = line if isinstance(line, bytes) else line.encode()
    good = b'{"image": "a.jpg", "phrases": ["cat"]}'
    bad, job = read_jobs_of(tmp_path, data + b"\n" + good)
    assert bad.number == 1
    assert message in bad.error
    assert len(bad.text) <= jobs.SHOWN
    assert job.phrases == ("cat",)


def read_jobs_of(folder: Path, data: bytes) -> list[Job | BadLine]:
    (folder / "jobs.jsonl").write_bytes(data)
    return list(read_jobs(folder / "jobs.jsonl"))


def test_other_scripts_null_and_repetitions(tmp_path):
    line = {"image": "фото.jpg", "phrases": ["猫", "🐈"], "boxes": None}
    found = one(tmp_path, json.dumps(line, ensure_ascii=False))
    assert found.phrases == ("猫", "🐈")
    assert found.image.name == "фото.jpg"
    data = json.dumps(line) + "\n"
    assert read_jobs_of(tmp_path, (2 * data).encode()) == [found]


def test_a_missing_job_file_is_an_error_of_use(tmp_path):
    with pytest.raises(UsageError, match="cannot read the job file"):
        next(read_jobs(tmp_path / "none.jsonl"))


def test_python_callers_get_the_same_checks():
    with pytest.raises(JobError, match="no prompt"):
        make_job("a.jpg")
    assert make_job(Path("a.jpg"), mask_prompt=Path("m.png")).mask_prompt == Path("m.png")


@pytest.fixture
def tree(tmp_path) -> Path:
    """Pictures in folders, among them our outputs, hidden files and others."""
    for name in (
        "p/a.jpg",
        "p/x/b.JPG",
        "p/x/y/c.png",
        "p/x/y/d.jp2",
        "p/notes.txt",
        "p/.hidden.jpg",
        "p/x/b_overlay.png",
        "p/b_masks/000_cat_0.90.png",
        "p/[1].jpg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path / "p"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["[1].jpg", "a.jpg"]),
        ("**/*.jpg", ["[1].jpg", "a.jpg"]),
        ("**/*.[jJ][pP][gG]", ["[1].jpg", "a.jpg", "b.JPG"]),
        ("**", ["[1].jpg", "a.jpg", "b.JPG", "c.png"]),
        ("**/*", ["[1].jpg", "a.jpg", "b.JPG", "c.png"]),
        ("**/*.png", ["c.png"]),
        ("x/*/*.jp2", ["d.jp2"]),
        ("?", ["b.JPG"]),
        ("b_masks/*.png", ["000_cat_0.90.png"]),
        ("[1].jpg", ["[1].jpg"]),
    ],
)
def test_patterns(tree, pattern, expected):
    found = files.expand_inputs([tree / pattern])
    assert sorted(file.name for file in found) == expected
    assert len(set(found)) == len(found)


def test_folders_with_folders(tree):
    assert [f.name for f in files.expand_inputs([tree])] == ["[1].jpg", "a.jpg"]
    found = files.expand_inputs([tree, tree / "*.jpg"], recursive=True)
    assert [f.name for f in found] == ["[1].jpg", "a.jpg", "b.JPG", "c.png"]


@pytest.mark.parametrize("pattern", ["*.bmp", "nowhere/**/*.jpg", "no[tes]*.gif"])
def test_a_pattern_without_pictures(tree, pattern):
    with pytest.raises(UsageError, match="no picture or video matches"):
        files.expand_inputs([tree / pattern])


def test_names_are_plain_where_they_can_be_and_always_differ():
    given = "p/a.jpg p/b/x.jpg p/c/x.jpg p/c/x.png p/c/X.tif p/b_x.jpg p/a.jpg p/ü.jpg".split()
    names = files.output_names([Path(g) for g in given])
    assert names == ["a_jpg_1", "b_x_jpg", "c_x_jpg", "c_x_png", "c_X_tif", "b_x", "a_jpg_2", "ü"]


def test_names_do_not_depend_on_the_order():
    given = [Path(g) for g in ("a/x.jpg", "b/x.jpg", "b/x.png", "a_x.jpg", "y.jpg")]
    expected = dict(zip(given, files.output_names(given), strict=True))
    for order in itertools.permutations(given):
        assert dict(zip(order, files.output_names(order), strict=True)) == expected


def test_odd_names():
    long = [Path("/d") / f"{'é' * 120}{i}.jpg" for i in range(2)]
    odd = [Path("/d/x.jpg"), Path("e/x.jpg"), Path("../f/x.jpg"), *long]
    names = files.output_names(odd)
    assert len({name.casefold() for name in names}) == len(odd)
    assert all(len(name.encode()) <= files.NAME_BYTES and "/" not in name for name in names)
    assert names[3].endswith("0")
    assert files.output_names([]) == []

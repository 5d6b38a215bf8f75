"""Checkpoints: exact, whole or not at all, and errors that say what to do."""

from __future__ import annotations

import functools
import json
import resource
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sam3_jax import checkpoint, config
from sam3_jax.checkpoint import CheckpointError, load, save, saving, sizes
from sam3_jax.checkpoint.tree import flatten, unflatten
from sam3_jax.models.detector import init_shapes
from sam3_jax.sharding import make_mesh, param_shardings

# Where reading or writing fails, Orbax's other threads meet an event loop that is closed already.
orbax_fails = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def params() -> dict:
    """Random parameters of the tiny model, as transposed views such as converters have."""
    rng = np.random.default_rng(0)

    def make(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return rng.standard_normal(leaf.shape[::-1], np.float32).T

    return jax.tree.map(make, init_shapes(config.tiny()))


@pytest.fixture
def saved(params: dict, tmp_path: Path) -> Path:
    """A checkpoint of the tracker: small, with both kinds of arrays."""
    tracker = {"tracker": params["tracker"], "vision": {"trunk": params["vision"]["trunk"]}}
    tracker["vision"]["tracker_neck"] = params["vision"]["tracker_neck"]
    unused = {"tracker.no_mem_pos_enc": np.ones((1, 1, 32), np.float32)}
    parts = ("tracker",)
    path = tmp_path / "ckpt"
    save(path, tracker, config.tiny(), unused=unused, parts=parts, metadata={"from": "a test"})
    return path


def assert_trees_equal(actual: dict, expected: dict) -> None:
    actual, expected = flatten(actual), flatten(expected)
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        assert actual[path].dtype == array.dtype, path
        np.testing.assert_array_equal(actual[path], array, err_msg=path)


def test_what_is_saved_is_loaded(params: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(saving, "GROUP_BYTES", 2**20)  # several groups, as at full size
    unused = {
        "detector.trunk.pos_embed[:, :1]": np.arange(3, dtype=np.int64),
        "blocks.0.attn.freqs_cis": np.exp(1j * np.arange(6)).astype(np.complex64).reshape(2, 3),
        "half": np.ones(2, ml_dtypes.bfloat16),
    }
    bytes_heard: list[int] = []
    model = config.tiny()
    model.vision.layer_norm_eps = 1e-6
    path = tmp_path / "new" / "ckpt"
    save(path, params, model, unused=unused, metadata={"a": [1]}, progress=bytes_heard.append)

    loaded = load(path)
    assert_trees_equal(loaded.params, params)
    assert loaded.config == model
    assert loaded.metadata == {"a": [1], "parts": ["image", "tracker"]}
    assert_trees_equal(checkpoint.load_unused(path), unused)
    assert len(bytes_heard) > 4
    total = sum(leaf.nbytes for leaf in [*flatten(params).values(), *unused.values()])
    assert sum(bytes_heard) == total
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "params", "unused"]
    assert [p.name for p in path.parent.iterdir()] == ["ckpt"]  # nothing temporary is left


def cast(tree: dict, dtype: np.dtype) -> dict:
    return jax.tree.map(lambda a: np.asarray(a).astype(dtype), tree)


def test_casting_while_saving(params: dict, tmp_path: Path):
    half = cast({"scoring": params["scoring"]}, ml_dtypes.bfloat16)
    save(tmp_path / "same", half, config.tiny(), parts=("image",))
    assert_trees_equal(load(tmp_path / "same").params, half)
    save(tmp_path / "cast", half, config.tiny(), parts=("image",), dtype=np.float32)
    assert_trees_equal(load(tmp_path / "cast").params, cast(half, np.float32))


def test_float16_is_for_files_alone(params: dict, tmp_path: Path):
    small = cast({"scoring": params["scoring"]}, np.float16)
    save(tmp_path / "small", small, config.tiny(), parts=("image",))
    assert_trees_equal(load(tmp_path / "small").params, cast(small, np.float32))


def test_backbone_matrices_in_half_precision(saved: Path):
    whole, half = flatten(load(saved).params), flatten(load(saved, dtype=jnp.bfloat16).params)
    for path, array in half.items():
        matrix = path.startswith("vision/") and path.endswith("/kernel")
        dtype = np.dtype(jnp.bfloat16 if matrix else np.float32)
        assert array.dtype == dtype, path
        np.testing.assert_array_equal(array, whole[path].astype(dtype), err_msg=path)
    assert {str(array.dtype) for array in half.values()} == {"bfloat16", "float32"}


def test_parts(saved: Path):
    loaded = load(saved, parts=("clicks",))
    assert loaded.metadata["parts"] == ["clicks"]
    assert loaded.params["vision"].keys() == {"trunk", "tracker_neck"}
    assert loaded.params["tracker"].keys() == {"prompt_encoder", "mask_decoder", "no_memory_embed"}
    whole = flatten(load(saved).params)
    for path, array in flatten(loaded.params).items():
        np.testing.assert_array_equal(array, whole[path])
    with pytest.raises(CheckpointError, match=r"no 'image' part, only tracker.*--part all"):
        load(saved, parts=("image",))


def test_sharded_load(saved: Path):
    """Each device gets its share, cast on the way, and together they are what was saved."""
    mesh = make_mesh(data=2, tensor=4)
    shardings = functools.partial(param_shardings, mesh=mesh)
    loaded = load(saved, dtype=jnp.bfloat16, shardings=shardings).params
    whole = load(saved).params
    expected = flatten(shardings(whole))
    split = 0
    for path, array in flatten(loaded).items():
        assert array.sharding == expected[path], path
        split += array.addressable_shards[0].data.size < array.size
    assert split > 20
    assert_trees_equal(jax.tree.map(np.asarray, loaded), load(saved, dtype=jnp.bfloat16).params)


def test_flatten_and_unflatten(params: dict):
    leaves = flatten(params)
    assert leaves["vision/trunk/block_0/attn/q/kernel"].shape == (48, 3, 16)
    assert_trees_equal(unflatten(leaves), params)


def edit(path: Path, change: Callable[[dict], object]) -> None:
    file = path / "config.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format_version=2), r"config\.json: format version 2.* reads 1"),
        (lambda d: d.update(arch="sam3.1"), r"architecture 'sam3\.1'"),
        (lambda d: d.update(parts=["video"]), r"parts \['video'\], not of image"),
        (lambda d: d["model"].update(dims=3), r"unknown field 'dims'; did you mean 'dim'"),
        (lambda d: d["model"]["vision"].update(dim="x"), r"model\.vision\.dim: expected int"),
        (lambda d: d["model"]["vision"].update(num_heads=4), r"vision\.num_heads is 4.* have 3"),
        (lambda d: d["model"]["vision"].update(depth=5), r"vision\.depth is 5.* have 4"),
        (lambda d: d["model"]["memory"].update(num_maps=9), r"memory\.num_maps is 9.* have 7"),
        (lambda d: d.pop("model"), r"config\.json: model: expected an object"),
        (lambda d: d.pop("format_version"), r"not of a converted checkpoint"),
    ],
)
def test_a_config_that_does_not_fit(saved: Path, change: Callable, message: str):
    edit(saved, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(saved)
    assert str(saved) in str(caught.value)


def test_every_size_of_the_configuration_is_compared(params: dict):
    """The table of sizes names parameters that exist, with the sizes of the tiny model."""
    shapes = {path: leaf.shape for path, leaf in flatten(params).items()}
    sizes.check_sizes(Path("here"), config.tiny(), shapes)
    for field, _, _ in sizes.SIZES:
        changed = config.tiny()
        *owners, last = field.split(".")
        owner = functools.reduce(getattr, owners, changed)
        setattr(owner, last, getattr(owner, last) + 1)
        with pytest.raises(CheckpointError, match=f"{field} is "):
            sizes.check_sizes(Path("here"), changed, shapes)


def test_wrong_folders(saved: Path, tmp_path: Path):
    remedy = "convert_torch_weights.py"
    with pytest.raises(CheckpointError, match=f"no such folder.*{remedy}"):
        load(tmp_path / "nowhere")
    (tmp_path / "sam3.pt").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=f"a file, not a checkpoint folder.*{remedy}"):
        load(tmp_path / "sam3.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=f"has no config.json.*{remedy}"):
        load(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "sam3_video"}')
    with pytest.raises(CheckpointError, match=f"folder of PyTorch weights.*{remedy}"):
        load(tmp_path / "empty")
    (saved / "config.json").write_text('{"format_version": 1, ')
    with pytest.raises(CheckpointError, match="cannot be read.*convert again"):
        load(saved)


def _largest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def _cut(folder: Path) -> None:
    file = _largest_file(folder)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no arrays": shutil.rmtree,
    "a data file is cut off": _cut,
    "a data file is gone": lambda folder: _largest_file(folder).unlink(),
    "the manifest is gone": lambda folder: (folder / "state" / "manifest.ocdbt").unlink(),
    "the metadata is gone": lambda folder: (folder / "state" / "_METADATA").unlink(),
    "the metadata is cut off": lambda folder: (folder / "state" / "_METADATA").write_text("{"),
}


@orbax_fails
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints(saved: Path, damage: str):
    DAMAGE[damage](saved / "params")
    with pytest.raises(CheckpointError, match=r"params: damaged or incomplete, convert .* again"):
        load(saved)


def test_a_taken_place_is_left_alone(params: dict, tmp_path: Path):
    (tmp_path / "ckpt").mkdir()
    save(tmp_path / "ckpt", {"scoring": params["scoring"]}, config.tiny())  # empty: fine
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="ckpt: exists already; choose another output"):
        save(tmp_path / "ckpt", {"scoring": params["scoring"]}, config.tiny())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="file: exists already"):
        save(tmp_path / "file", {"scoring": params["scoring"]}, config.tiny())
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "file"])


def test_overwrite(params: dict, tmp_path: Path):
    path = tmp_path / "ckpt"
    save(path, {"scoring": params["scoring"]}, config.tiny(), unused={"a": np.ones(2)})
    new = cast({"scoring": params["scoring"]}, ml_dtypes.bfloat16)
    save(path, new, config.tiny(), overwrite=True)
    assert_trees_equal(load(path).params, new)
    assert checkpoint.load_unused(path) == {}
    assert list(tmp_path.iterdir()) == [path]

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(path, params, config.tiny(), overwrite=True, progress=interrupt)
    assert_trees_equal(load(path).params, new)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(CheckpointError, match="mine: exists already"):
        save(tmp_path / "mine", new, config.tiny(), overwrite=True)


def test_a_disk_that_is_too_small(params: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")(10**6, 10**6 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs 0\.0\d GB and 0\.00 GB are free.*free some"):
        save(tmp_path / "ckpt", params, config.tiny())
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_files() -> Iterator[None]:
    """Writing past 64 KB fails, as on a disk that fills up meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@orbax_fails
@pytest.mark.usefixtures("small_files")
def test_a_disk_that_fills_up(params: dict, tmp_path: Path):
    with pytest.raises(CheckpointError, match="ckpt: writing failed, nothing was kept"):
        save(tmp_path / "ckpt", params, config.tiny())
    assert list(tmp_path.iterdir()) == []


@orbax_fails
def test_an_interrupted_save_leaves_nothing(params: dict, tmp_path: Path):
    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "ckpt", params, config.tiny(), progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(params: dict, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: cannot be written to"):
        save(tmp_path / "file" / "ckpt", {"scoring": params["scoring"]}, config.tiny())

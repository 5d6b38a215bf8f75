"""Exported StableHLO programs give what the model gives, without Flax and the model's code."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny_predictor
from sam3_jax import checkpoint
from sam3_jax.checkpoint.tree import flatten
from sam3_jax.inference import export_programs
from sam3_jax.inference.export import export_checkpoint, export_model
from sam3_jax.inference.exported import (
    ExportedImage,
    ExportedModel,
    ExportedText,
    ExportError,
    load_exported,
)
from sam3_jax.inference.files import UsageError
from sam3_jax.models.detector import Sam3
from sam3_jax.models.sam_heads import select_masks
from sam3_jax.ops import attention
from sam3_jax.types import ClickPrompt, Geometry

pytest.importorskip("flatbuffers", reason="jax.export writes its files with flatbuffers")

PROGRAMS = ("encode_image", "encode_text", "ground", "click")
# Of the spread, float32: the same operations in programs that XLA fuses differently.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything, with free sizes, for all platforms."""
    target = tmp_path_factory.mktemp("export") / "model"
    return export_model(tiny_predictor.params(), tiny_predictor.config(), target, dtype="float32")


@pytest.fixture(scope="module")
def model(folder: Path) -> ExportedModel:
    return load_exported(folder)


def inputs() -> dict[str, np.ndarray]:
    """Two images, three phrases with up to two boxes, three clicks with up to two points."""
    rng = np.random.default_rng(1)
    config = tiny_predictor.config()
    side, context = config.image_size, config.text.context_length
    return {
        "pixels": rng.uniform(-1, 1, (2, side, side, 3)).astype(np.float32),
        "token_ids": rng.integers(1, 49000, (3, context)).astype(np.int32),
        "boxes": rng.uniform(0.2, 0.8, (3, 2, 4)).astype(np.float32),
        "box_labels": np.array([[1, 0], [1, -2], [-2, -2]], np.int32),
        "points": rng.uniform(0, side, (3, 2, 2)).astype(np.float32),
        "labels": np.array([[1, 0], [1, -2], [2, 3]], np.int32),
        "image_index": np.array([1, 0, 1], np.int32),
    }


def reference() -> dict[str, Any]:
    """What the model itself makes of :func:`inputs`."""
    x = inputs()
    config = tiny_predictor.config()
    network = Sam3(config)
    used = x["box_labels"] >= 0
    nothing = np.zeros((3, 0), np.int32)
    none = (nothing, nothing.astype(bool))
    geometry = Geometry(
        *(np.zeros((3, 0, 2), np.float32), *none),
        *(x["boxes"], np.where(used, x["box_labels"], 0), used),
        *(np.zeros((3, 0, 1, 1), np.float32), *none),
    )
    side = 4 * config.image_size // config.vision.patch_size
    clicks = ClickPrompt(
        x["points"], x["labels"], np.zeros((3, side, side), np.float32), np.zeros(3, bool)
    )

    geometry, clicks = jax.tree.map(jnp.asarray, (geometry, clicks))

    def run(params: dict) -> dict[str, Any]:
        def apply(method: str, *args: Any) -> Any:
            return network.apply({"params": params}, *args, method=method)

        index = jnp.asarray(x["image_index"])
        image = apply("encode_image", jnp.asarray(x["pixels"]))
        text = apply("encode_text", jnp.asarray(x["token_ids"]))
        found = apply("ground", image.detector, text, geometry, index, None)
        clicked = apply("click", image.tracker, clicks, index)
        three = select_masks(clicked, config.sam, multimask=True)
        return {
            "image": (image.detector, image.tracker),
            "text": tuple(text),
            "found": tuple(found[:5]),
            "clicked": (
                *three,
                *select_masks(clicked, config.sam, multimask=False),
                clicked.object_logits,
            ),
        }

    lowered = jax.jit(run).lower(tiny_predictor.params())
    quick = lowered.compile({"xla_backend_optimization_level": 0})  # compiling is what takes time
    return jax.device_get(quick(tiny_predictor.params()))


def assert_close(actual: Any, expected: Any) -> None:
    leaves, wanted = jax.tree.leaves(tuple(actual)), jax.tree.leaves(expected)
    assert len(leaves) == len(wanted)
    for got, want in zip(leaves, wanted, strict=True):
        got = np.asarray(got)
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        if want.dtype == bool:
            np.testing.assert_array_equal(got, want)
            continue
        assert want.std() > 0
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * np.ptp(want))


def test_all_programs_equal_the_model(model):
    x, expected = inputs(), reference()
    image = model.encode_image(x["pixels"])
    assert_close(image, expected["image"])
    text = model.encode_text(x["token_ids"])
    assert_close(text, expected["text"])
    # Two boxes are padded to the four slots of the export: masked slots change nothing.
    found = model.ground(image, text, x["boxes"], x["box_labels"], x["image_index"])
    assert_close(found, expected["found"])
    clicked = model.click(image, x["points"], x["labels"], image_index=x["image_index"])
    assert_close(clicked, expected["clicked"])


WITHOUT_FLAX = """
import sys
for name in ("flax", "orbax", "sam3_jax.models", "sam3_jax.ops", "sam3_jax.config", "jaxtyping"):
    sys.modules[name] = None  # importing it is an ImportError
import numpy as np
from sam3_jax.inference.exported import load_exported
folder, ids, out = sys.argv[1:]
model = load_exported(folder)
np.savez(out, **model.encode_text(np.load(ids))._asdict())
print(*model.programs)
"""


def test_loads_without_flax_in_another_process(folder, model, tmp_path):
    ids = inputs()["token_ids"]
    np.save(tmp_path / "ids.npy", ids)
    files = [str(tmp_path / name) for name in ("ids.npy", "out.npz")]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_FLAX, str(folder), *files],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    assert tuple(done.stdout.split()) == PROGRAMS
    with np.load(files[1]) as out:
        assert_close([out["tokens"], out["mask"]], jax.device_get(tuple(model.encode_text(ids))))


def test_description(folder):
    description = json.loads((folder / "export.json").read_text())
    assert description["schema_version"] == 1
    assert description["platforms"] == ["cpu", "cuda", "tpu"]
    assert description["batch"] is None
    assert description["dtype"] == "float32"
    assert description["model"]["image_size"] == 112
    assert tuple(description["programs"]) == PROGRAMS
    ground = description["programs"]["ground"]
    assert [value["name"] for value in ground["inputs"]] == [
        *("detector_0", "detector_1", "detector_2", "tokens", "token_mask"),
        *("boxes", "box_labels", "box_mask", "image_index"),
    ]
    assert ground["inputs"][0]["shape"] == ["b", 32, 32, 32]
    assert ground["outputs"][3] == {"name": "masks", "shape": ["p", 12, 32, 32], "dtype": "float32"}
    # Parameters are arguments; the memory of the tracker is in no program and not in the file.
    assert ground["main_arguments"][:2] == ["platform index", ground["parameters"][0]]
    assert len(ground["main_arguments"]) == 1 + len(ground["parameters"]) + len(ground["inputs"])
    used = {path for spec in description["programs"].values() for path in spec["parameters"]}
    held = set(flatten(tiny_predictor.params()))
    assert used < held
    assert not any(path.startswith("tracker/memory") for path in used)
    size = sum(leaf.nbytes for path, leaf in flatten(tiny_predictor.params()).items()
               if path in used)  # fmt: skip
    assert size <= (folder / "params.safetensors").stat().st_size <= size + 100_000


def test_main_takes_the_listed_arguments(folder, model):
    description = json.loads((folder / "export.json").read_text())
    for name, program in model.programs.items():
        text = program.mlir_module()
        begin = text.index("@main(")
        signature = text[begin : text.index("->", begin)]
        count = len(description["programs"][name]["main_arguments"])
        assert f"%arg{count - 1}:" in signature
        assert f"%arg{count}:" not in signature


def test_programs_name_no_folder_of_this_machine(folder):
    root = str(Path(__file__).resolve().parents[1]).encode()
    for name in PROGRAMS:
        assert root not in (folder / f"{name}.stablehlo").read_bytes()


# ---- other kinds of export


def test_fixed_batch_of_a_tracker(tmp_path):
    params = {name: tiny_predictor.params()[name] for name in ("vision", "tracker")}
    folder = export_model(
        params, tiny_predictor.config(), tmp_path / "e", batch=1, platforms=("cpu",), points=2
    )
    model = load_exported(folder)
    assert list(model.programs) == ["encode_image", "click"]
    assert model.description["dtype"] == "float32"  # "auto" for CPUs alone
    assert model.description["programs"]["click"]["inputs"][3]["shape"] == [1, 2, 2]
    assert "platform index" not in model.description["programs"]["click"]["main_arguments"]
    with pytest.raises(ExportError, match=r"pixels must have shape \(1, 112, 112, 3\)"):
        model.encode_image(np.zeros((2, 112, 112, 3), np.float32))
    with pytest.raises(ExportError, match="has no 'encode_text', only encode_image, click"):
        model.encode_text(np.zeros((1, 32), np.int32))


@pytest.mark.parametrize("portable", [True, False])
def test_portable_attention_calls_no_kernel(monkeypatch, portable):
    monkeypatch.setattr(attention, "FLASH_SCORES", 0)  # the toy's attention is worth a kernel
    network = Sam3(tiny_predictor.config(), jnp.dtype(jnp.bfloat16))
    params = flatten({"text": tiny_predictor.params()["text"]})
    entry = export_programs.encode_text(network)
    program = export_programs.trace("encode_text", entry, params, ["tpu"], 1, portable)
    assert ("tpu_custom_call" in program.mlir_module()) == (not portable)


def test_checkpoint_of_the_command_line(tmp_path):
    params, config = tiny_predictor.params(), tiny_predictor.config()
    kept = {name: params[name] for name in ("vision", "tracker")}
    checkpoint.save(tmp_path / "ckpt", kept, config, parts=("tracker",))
    line = export_checkpoint(tmp_path / "ckpt", tmp_path / "e", platforms=("cpu",), batch=1)
    assert str(tmp_path / "e") in line
    assert "click, encode_image in float32 for cpu" in line
    with pytest.raises(UsageError, match="exists already"):
        export_checkpoint(tmp_path / "ckpt", tmp_path / "e", platforms=("cpu",), batch=1)
    with pytest.raises(UsageError, match="no such folder"):
        export_checkpoint(tmp_path / "none", tmp_path / "f")


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"platforms": ("gpu",)}, r"platforms must be some of cpu, cuda, tpu, rocm, got \('gpu',"),
        ({"platforms": ()}, "platforms must be some of"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"boxes": 0}, "boxes must be at least 1"),
        ({"dtype": "int8"}, "dtype must be one of auto, bfloat16, float32, got 'int8'"),
        ({"portable_attention": False}, "needs one platform and a batch size"),
    ],
)
def test_refuses_options(tmp_path, options, message):
    with pytest.raises(ExportError, match=message):
        export_model(tiny_predictor.params(), tiny_predictor.config(), tmp_path / "e", **options)
    assert not list(tmp_path.iterdir())


def test_refuses_parameters_without_an_image_model(tmp_path):
    text = {"text": tiny_predictor.params()["text"]}
    with pytest.raises(ExportError, match="hold no image model"):
        export_model(text, tiny_predictor.config(), tmp_path / "e")


def arguments(**changes: Any) -> dict[str, Any]:
    x = inputs()
    return {**{name: x[name] for name in ("boxes", "box_labels", "image_index")}, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_index": None}, "3 prompts on 2 images: give image_index"),
        ({"image_index": [0, 1]}, r"image_index must have shape \(p\) with p = 3, got \(2,\)"),
        ({"image_index": [0, 1, 2]}, r"image_index must lie in 0..1, got \[0, 1, 2\]"),
        ({"image_index": [0.0, 1.0, 0.0]}, "image_index must be int32, got float64"),
        ({"boxes": np.zeros((3, 2, 3))}, r"boxes must have shape \(p, 4, 4\)"),
        ({"boxes": np.zeros((2, 4))}, r"boxes must be \(prompts, number, 4\)"),
        (
            {"boxes": np.zeros((3, 5, 4)), "box_labels": np.ones((3, 5), int)},
            "5 boxes a prompt, the export has room for 4; export again with boxes=5",
        ),
    ],
)
def test_refuses_inputs(model, changes, message):
    shapes = {value["name"]: value["shape"] for value in model._spec("ground")["inputs"]}
    levels = tuple(np.zeros((2, *shapes[f"detector_{i}"][1:]), np.float32) for i in range(3))
    text = ExportedText(np.zeros((3, 32, 32), np.float32), np.ones((3, 32), bool))
    with pytest.raises(ExportError, match=f"ground: {message}"):
        model.ground(ExportedImage(levels, ()), text, **arguments(**changes))


def test_refuses_bytes_as_pixels(model):
    with pytest.raises(ExportError, match="pixels must be float32, got uint8"):
        model.encode_image(np.zeros((1, 112, 112, 3), np.uint8))


def edit(folder: Path, **changes: Any) -> None:
    description = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps({**description, **changes}))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def unreadable_program(folder: Path) -> None:
    """A program of a jax that writes something else, with the right digest."""
    (folder / "click.stablehlo").write_bytes(b"not a program")
    programs = json.loads((folder / "export.json").read_text())["programs"]
    programs["click"]["sha256"] = hashlib.sha256(b"not a program").hexdigest()
    edit(folder, programs=programs)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "export.json").unlink(), "export.json: no such file; infer.py"),
        (lambda d: cut(d / "export.json"), "export.json: cannot be read"),
        (lambda d: (d / "export.json").write_text("[]"), "export.json: cannot be read"),
        (lambda d: edit(d, schema_version=99), "schema version 99, this program reads 1"),
        (lambda d: edit(d, programs=None), "export.json: damaged"),
        (
            lambda d: edit(d, platforms=["rocm", "tpu"]),
            "was exported for rocm, tpu and jax runs on",
        ),
        (lambda d: edit(d, parameters=None), "exported without parameters; give params="),
        (lambda d: (d / "ground.stablehlo").unlink(), "ground.stablehlo: cannot be read"),
        (lambda d: cut(d / "ground.stablehlo"), "ground.stablehlo: damaged or of another export"),
        (unreadable_program, "click.stablehlo: this jax .* cannot read it"),
        (lambda d: cut(d / "params.safetensors"), "params.safetensors: cannot be used"),
        (lambda d: (d / "params.safetensors").unlink(), "params.safetensors: cannot be used"),
    ],
)
def test_damaged_folders_are_named(folder, tmp_path, damage, message):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy)
    with pytest.raises(ExportError, match=message) as caught:
        load_exported(copy)
    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value)


def test_parameters_of_the_caller(folder):
    params = tiny_predictor.params()
    model = load_exported(folder, params=params)
    flat = flatten(params)
    for name, leaf in model.params.items():
        np.testing.assert_array_equal(leaf, flat[name], err_msg=name)
    with pytest.raises(ExportError, match="parameter tracker/.* is absent, encode_image needs"):
        load_exported(folder, params={"text": params["text"]})
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    with pytest.raises(ExportError, match="is bfloat16 .*, encode_image needs float32"):
        load_exported(folder, params=half)


def test_replaces_only_exports(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "e")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    params = {name: tiny_predictor.params()[name] for name in ("vision", "tracker")}
    options = {"batch": 1, "platforms": ("cpu",), "save_params": False}
    with pytest.raises(checkpoint.CheckpointError, match="exists already"):
        export_model(params, tiny_predictor.config(), tmp_path / "other", overwrite=True, **options)
    assert (tmp_path / "other" / "letter.txt").read_text() == "mine"
    export_model(params, tiny_predictor.config(), tmp_path / "e", overwrite=True, **options)
    names = sorted(file.name for file in (tmp_path / "e").iterdir())
    assert names == ["click.stablehlo", "encode_image.stablehlo", "export.json"]

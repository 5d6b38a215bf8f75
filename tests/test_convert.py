"""Conversion: strict, in every layout, and never half."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import oracle
from sam3_jax import config
from sam3_jax.checkpoint import CheckpointError, load, load_unused
from sam3_jax.checkpoint.parts import in_parts
from sam3_jax.checkpoint.tree import flatten, unflatten
from sam3_jax.convert import cli, hf_names
from sam3_jax.convert.convert import convert
from sam3_jax.convert.errors import ConversionError
from sam3_jax.convert.export import to_torch_names
from sam3_jax.convert.layout import hf_layout, release_layout
from sam3_jax.convert.rows import source_shape
from sam3_jax.convert.source import open_source
from sam3_jax.convert.table import CLASS_ROW, POS_EMBED, build_table, unused_names
from sam3_jax.models.detector import Sam3, empty_click, init_shapes

# transformers fixes 64 channels of memory, and our encoder projects to them only from more.
SMALL = dataclasses.replace(config.tiny(), dim=128)
SMALL.memory.dim = 64
BUILD = {
    "Sam3Model": oracle.detector,
    "Sam3TrackerModel": oracle.tracker,
    "Sam3TrackerVideoModel": oracle.tracker_video,
    "Sam3VideoModel": oracle.video,
}
HELD = {
    "Sam3Model": ("image",),
    "Sam3TrackerModel": ("clicks",),
    "Sam3TrackerVideoModel": ("tracker",),
    "Sam3VideoModel": ("image", "tracker"),
}
POINTS = [f"geometry/point_{m}/{p}" for m in ("direct", "pool", "sine") for p in ("bias", "kernel")]
NECK = "detector.backbone.vision_backbone.convs"


@pytest.fixture(autouse=True)
def _shapes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing the model for its shapes takes a second or two: once a configuration will do."""
    monkeypatch.setattr("sam3_jax.convert.convert.init_shapes", _shapes)


_CACHE: dict[str, dict] = {}


def _shapes(sizes: config.ModelConfig) -> dict:
    key = repr(
        dataclasses.replace(sizes, vision=dataclasses.replace(sizes.vision, layer_norm_eps=0.0))
    )
    if key not in _CACHE:
        _CACHE[key] = init_shapes(sizes)
    return _CACHE[key]


@pytest.fixture(scope="module")
def release() -> dict[str, torch.Tensor]:
    """All tensors of ``sam3.pt`` at tiny size, random."""
    rng = np.random.default_rng(0)
    shapes = flatten(_shapes(config.tiny()))
    params = {path: rng.standard_normal(leaf.shape, np.float32) for path, leaf in shapes.items()}
    unused = {name: rng.standard_normal((3, 2), np.float32) for name in unused_names(config.tiny())}
    for name in unused:
        if name.endswith("freqs_cis"):
            unused[name] = np.exp(1j * rng.standard_normal((16, 8))).astype(np.complex64)
    unused[CLASS_ROW] = rng.standard_normal((1, 1, 48), np.float32)
    named = to_torch_names(unflatten(params), unused, config.tiny())
    return {name: torch.from_numpy(np.array(array)) for name, array in named.items()}


@pytest.fixture(scope="module")
def hf_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of ``save_pretrained`` for each of transformers' classes."""
    folders = {}
    for name, build in BUILD.items():
        folders[name] = tmp_path_factory.mktemp("hf") / name
        oracle.randomize(build(SMALL), seed=0).save_pretrained(folders[name])
    return folders


@pytest.fixture
def convert_release(release: dict, tmp_path: Path) -> Callable:
    """Converts the release after a change to its tensors."""

    def run(change: Callable[[dict], object] = lambda state: None, **options):
        state = dict(release)
        change(state)
        torch.save(state, tmp_path / "sam3.pt")
        source = open_source(str(tmp_path / "sam3.pt"))
        return convert(source, tmp_path / "ckpt", config=config.tiny(), **options)

    return run


def test_every_tensor_of_the_release_has_its_place():
    """Names and shapes of the released file: 1465 tensors, each in the table or unused, once."""
    tensors = oracle.sam3_pt_tensors()
    shapes = {path: leaf.shape for path, leaf in flatten(init_shapes(config.sam3())).items()}
    rows = build_table(config.sam3())
    names = [row.source for row in rows] + unused_names(config.sam3())
    assert sorted(names) == sorted(tensors)
    assert len(tensors) == 1465
    filled = set()
    for row in rows:
        paths = [target.partition("[")[0] for target in row.targets]
        indexed = row.targets[0].endswith("]")
        wanted = [shapes[path][1:] if indexed else shapes[path] for path in paths]
        expected = (1, 577, 1024) if row.source == POS_EMBED else source_shape(row, wanted)
        assert tensors[row.source][0] == expected, row.source
        assert tensors[row.source][1] == torch.float32
        filled.update(paths)
    assert filled == set(shapes)


@pytest.mark.parametrize("name", BUILD)
def test_every_tensor_of_transformers_has_its_place(name: str):
    with torch.device("meta"):
        model = BUILD[name](config.sam3())
    layout = hf_layout(name, config.sam3())
    named = [row.source for row in layout.rows] + [item.source for item in layout.unused]
    assert sorted([*named, *layout.copies]) == sorted(model.state_dict())
    parts = layout.held_parts({row.source for row in layout.rows})
    assert parts == HELD[name]
    made = {t.partition("[")[0] for row in layout.rows for t in row.targets}
    whole = {t.partition("[")[0] for row in build_table(config.sam3()) for t in row.targets}
    assert whole - made == {path for path in whole if path in POINTS or not in_parts(path, parts)}


def test_the_release(release: dict, convert_release: Callable, tmp_path: Path):
    report = convert_release()
    assert report.parts == ("image", "tracker")
    assert (report.missing_parts, report.zero_filled, report.left_out) == ((), (), 0)
    loaded = load(tmp_path / "ckpt")
    shapes = _shapes(config.tiny())
    assert {p: (a.shape, a.dtype) for p, a in flatten(loaded.params).items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in flatten(shapes).items()
    }
    assert report.parameters == sum(array.size for array in flatten(loaded.params).values())
    assert loaded.config == config.tiny()
    assert loaded.config.vision.layer_norm_eps == 1e-5
    file = tmp_path / "sam3.pt"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    source = {"name": "sam3.pt", "bytes": file.stat().st_size, "sha256": digest}
    assert loaded.metadata["source"] == [source]
    assert loaded.metadata["layout"] == "sam3.pt"
    unused = load_unused(tmp_path / "ckpt")
    assert set(unused) == {*unused_names(config.tiny()), CLASS_ROW}
    for name in unused_names(config.tiny()):
        assert unused[name].tobytes() == release[name].numpy().tobytes(), name


def test_numbers_arrive_where_torch_has_them(
    release: dict, convert_release: Callable, tmp_path: Path
):
    """Written from the definitions of torch's layers, one case of each kind of tensor."""
    convert_release()
    params = flatten(load(tmp_path / "ckpt").params)
    get = {name: tensor.numpy() for name, tensor in release.items()}
    equal = np.testing.assert_array_equal
    block = "detector.backbone.vision_backbone.trunk.blocks.2"
    equal(params["vision/trunk/block_2/mlp/fc1/kernel"], get[f"{block}.mlp.fc1.weight"].T)
    q, k, _ = np.split(get[f"{block}.attn.qkv.weight"], 3)
    x = np.random.default_rng(1).standard_normal(48).astype(np.float32)
    heads = np.einsum("i,ihd->hd", x, params["vision/trunk/block_2/attn/k/kernel"])
    np.testing.assert_allclose(heads.reshape(-1), k @ x, rtol=1e-4, atol=1e-4)  # order of sums
    equal(params["vision/trunk/block_2/attn/q/kernel"].reshape(48, 48), q.T)
    out = params["vision/trunk/block_2/attn/out/kernel"].reshape(48, 48)
    equal(out, get[f"{block}.attn.proj.weight"].T)
    bias = params["vision/trunk/block_2/attn/v/bias"].reshape(-1)
    equal(bias, get[f"{block}.attn.qkv.bias"][96:])
    conv = get["detector.backbone.vision_backbone.trunk.patch_embed.proj.weight"]
    equal(params["vision/trunk/patch_embed/kernel"], conv.transpose(2, 3, 1, 0))
    up = get[f"{NECK}.1.dconv_2x2.weight"]  # in, out, h, w
    equal(params["vision/detector_neck/level_1_up_0/kernel"], up.transpose(2, 3, 1, 0))
    equal(params["vision/trunk/pos_embed"].reshape(16, 48), get[POS_EMBED][0, 1:])
    for i in range(4):
        row = get[f"tracker.sam_prompt_encoder.point_embeddings.{i}.weight"][0]
        equal(params["tracker/prompt_encoder/point_embed/embedding"][i], row)
    equal(
        params["tracker/memory_encoder/block_1/gamma"],
        get["tracker.maskmem_backbone.fuser.layers.1.gamma"],
    )


LINEAR = "detector.transformer.encoder.layers.1.linear1"
STRICT: dict[str, tuple[Callable[[dict], object], list[str]]] = {
    "missing": (
        lambda s: s.pop(f"{LINEAR}.weight"),
        [rf"1 problem, nothing was written\n  - {LINEAR}.weight is missing \(fusion/layer_1/"],
    ),
    "extra": (
        lambda s: s.update({"detector.adapter.weight": torch.zeros(2, 3)}),
        [r"detector\.adapter\.weight \(2, 3\) is no tensor of SAM 3"],
    ),
    "misspelt": (
        lambda s: s.update({f"{LINEAR}.wight": s.pop(f"{LINEAR}.weight")}),
        [
            rf"2 problems.*{LINEAR}.weight is missing .*; the closest is {LINEAR}.wight",
            rf"{LINEAR}.wight \(64, 32\) is no tensor of SAM 3; the closest is {LINEAR}.weight",
        ],
    ),
    "mis-shaped": (
        lambda s: s.update({f"{LINEAR}.weight": torch.zeros(32, 64)}),
        [rf"{LINEAR}.weight has shape \(32, 64\), the model expects \(64, 32\)"],
    ),
    "position table without its class row": (
        lambda s: s.update({POS_EMBED: s[POS_EMBED][:, 1:]}),
        [r"pos_embed has shape \(1, 15, 48\), the model expects \(1, 16, 48\)"],
    ),
    "dtype": (
        lambda s: s.update({f"{LINEAR}.bias": s[f"{LINEAR}.bias"].long()}),
        [rf"{LINEAR}.bias is int64; expected float32, float16 or bfloat16"],
    ),
    "all at once": (
        lambda s: [
            s.pop("tracker.no_mem_embed"),
            s.update({f"{LINEAR}.weight": torch.zeros(1), "a": torch.zeros(1)}),
            s.update({"tracker.no_obj_ptr": s["tracker.no_obj_ptr"].double()}),
        ],
        ["4 problems", "no_mem_embed is missing", "has shape", r"  - a \(1,\)", "is float64"],
    ),
}


@pytest.mark.parametrize("case", STRICT)
def test_strictness(case: str, convert_release: Callable, tmp_path: Path):
    change, messages = STRICT[case]
    with pytest.raises(ConversionError) as caught:
        convert_release(change)
    for message in messages:
        assert caught.match(rf"(?s){message}"), message
    assert [path.name for path in tmp_path.iterdir()] == ["sam3.pt"]


def test_hundreds_of_problems_are_counted(convert_release: Callable):
    def halve(state: dict) -> None:
        state.update({name: tensor[:1] for name, tensor in state.items()})

    with pytest.raises(ConversionError) as caught:
        convert_release(halve)
    assert caught.match(r"(?s)\d\d\d problems.*\.\.\. and \d+ more of them$")
    assert len(str(caught.value).splitlines()) == 42


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision(dtype: torch.dtype, convert_release: Callable, tmp_path: Path):
    """They become float32, exactly."""

    def halve(state: dict) -> None:
        floats = {n: t.to(dtype) for n, t in state.items() if t.dtype == torch.float32}
        state.update({**floats, "tracker.no_mem_embed": state["tracker.no_mem_embed"]})

    convert_release(halve)
    halved = torch.load(tmp_path / "sam3.pt", weights_only=True)
    loaded = load(tmp_path / "ckpt")
    assert {array.dtype.name for array in flatten(loaded.params).values()} == {"float32"}
    half = str(dtype).removeprefix("torch.")
    assert loaded.metadata["dtypes"] == sorted([half, "complex64", "float32"])
    np.testing.assert_array_equal(
        loaded.params["decoder"]["query_embed"]["embedding"],
        halved["detector.transformer.decoder.query_embed.weight"].float().numpy(),
    )


@pytest.mark.parametrize(
    ("part", "parts", "own"),
    [("image", ("image",), "decoder"), ("tracker", ("tracker",), "tracker")],
)
def test_one_part(
    part: str, parts: tuple, own: str, convert_release: Callable, release: dict, tmp_path: Path
):
    report = convert_release(part=part)
    assert (report.parts, report.missing_parts) == (parts, ())
    loaded = load(tmp_path / "ckpt")
    paths = set(flatten(loaded.params))
    shapes = flatten(_shapes(config.tiny()))
    assert paths == {path for path in shapes if in_parts(path, parts)}
    assert own in loaded.params
    assert "trunk" in loaded.params["vision"]
    kept = len(load_unused(tmp_path / "ckpt")) - 1  # the class row is a piece of a tensor
    in_use = [row for row in build_table(config.tiny()) if in_parts(row.targets[0], parts)]
    assert report.left_out == len(release) - kept - len(in_use)


def test_a_source_that_holds_one_part(convert_release: Callable, tmp_path: Path, capsys):
    def detector_only(state: dict) -> None:
        for name in [name for name in state if name.startswith("tracker.")]:
            del state[name]

    report = convert_release(detector_only)
    assert (report.parts, report.missing_parts) == (("image",), ("tracker",))
    shutil.rmtree(tmp_path / "ckpt")
    with pytest.raises(ConversionError, match=r"nothing of the part 'tracker', only image"):
        convert_release(detector_only, part="tracker")
    arguments = ["--input", str(tmp_path / "sam3.pt"), "--output", str(tmp_path / "ckpt")]
    assert cli.main([*arguments, "--config", "tiny"]) == 0
    assert "has no whole tracker part" in capsys.readouterr().out


@pytest.mark.parametrize("name", BUILD)
def test_transformers_folders(name: str, hf_folders: dict[str, Path], tmp_path: Path):
    """Sizes and eps come from config.json; the numbers equal those of the same model's sam3.pt."""
    report = convert(open_source(str(hf_folders[name])), tmp_path / "ckpt")
    assert report.parts == HELD[name]
    loaded = load(tmp_path / "ckpt")
    assert loaded.config.vision == SMALL.vision
    assert (loaded.config.dim, loaded.config.image_size) == (128, 112)
    has_detector = "image" in report.parts
    assert list(report.zero_filled) == (sorted(POINTS) if has_detector else [])
    params = flatten(loaded.params)
    assert all(not params[path].any() for path in report.zero_filled)

    state = {k: v.numpy() for k, v in oracle.randomize(BUILD[name](SMALL), 0).state_dict().items()}
    made = to_torch_names(loaded.params, load_unused(tmp_path / "ckpt"), SMALL)
    prefix = "detector_model." if name == "Sam3VideoModel" else ""
    attention = f"{prefix}vision_encoder.backbone.layers.3.attention"
    joined = np.concatenate([state[f"{attention}.{p}_proj.weight"] for p in "qkv"])
    trunk = "detector.backbone.vision_backbone.trunk"
    np.testing.assert_array_equal(made[f"{trunk}.blocks.3.attn.qkv.weight"], joined)
    if has_detector:
        norm = f"{prefix}detr_decoder.layers.2.vision_cross_attn_layer_norm.weight"
        layer = "detector.transformer.decoder.layers.2"
        np.testing.assert_array_equal(made[f"{layer}.norm1.weight"], state[norm])
        projection = state[f"{prefix}text_encoder.text_projection.weight"]
        text = "detector.backbone.language_backbone.encoder"
        np.testing.assert_array_equal(made[f"{text}.text_projection"], projection.T)
    if report.parts != ("image",):
        prefix = "tracker_model." if name == "Sam3VideoModel" else ""
        points = state[f"{prefix}prompt_encoder.point_embed.weight"]
        row = made["tracker.sam_prompt_encoder.point_embeddings.2.weight"]
        np.testing.assert_array_equal(row, points[2:3])


def test_a_checkpoint_for_clicks_alone_works(hf_folders: dict[str, Path], tmp_path: Path):
    convert(open_source(str(hf_folders["Sam3TrackerModel"])), tmp_path / "ckpt")
    loaded = load(tmp_path / "ckpt")
    model = Sam3(loaded.config)

    def click(params: dict) -> jax.Array:
        pixels, index = jnp.zeros((1, 112, 112, 3)), jnp.zeros(1, jnp.int32)
        features = model.apply({"params": params}, pixels, detector=False, method="encode_image")
        prompt = empty_click(1, 1, (32, 32))
        return model.apply({"params": params}, features.tracker, prompt, index, method="click")

    assert jax.eval_shape(click, loaded.params).masks.shape == (1, 4, 32, 32)


def test_sharded_files_and_single_ones(tmp_path: Path):
    model = oracle.randomize(BUILD["Sam3TrackerVideoModel"](SMALL), seed=0)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="2MB")
    index = tmp_path / "many" / "model.safetensors.index.json"
    whole = open_source(str(tmp_path / "one" / "model.safetensors"))
    for name in (tmp_path / "many", index):
        sharded = open_source(str(name))
        assert len(sharded.files) > 2
        assert sharded.tensors.keys() == whole.tensors.keys()
        for key, array in whole.tensors.items():
            np.testing.assert_array_equal(sharded.tensors[key], array, err_msg=key)
    convert(sharded, tmp_path / "ckpt")
    names = [file["name"] for file in load(tmp_path / "ckpt").metadata["source"]]
    assert names == sorted({*json.loads(index.read_text())["weight_map"].values()})

    sharded.files[1].rename(tmp_path / "away")
    with pytest.raises(ConversionError, match=rf"{sharded.files[1].name} is missing beside it"):
        open_source(str(index))
    for change, message in (
        ("../elsewhere.safetensors", "lies in another folder"),
        (sharded.files[0].name, r"should be in .* and is not"),
    ):
        data = json.loads(index.read_text())
        data["weight_map"] = {"a": sharded.files[0].name, "b": change}
        index.write_text(json.dumps(data))
        with pytest.raises(ConversionError, match=message):
            open_source(str(index))
    index.write_text("[]")
    with pytest.raises(ConversionError, match="not an index"):
        open_source(str(index))


def test_without_a_config_the_eps_is_that_of_transformers(hf_folders: dict, tmp_path: Path):
    file = shutil.copy(hf_folders["Sam3TrackerModel"] / "model.safetensors", tmp_path)
    convert(open_source(str(file)), tmp_path / "ckpt", config=SMALL)
    assert load(tmp_path / "ckpt").config.vision.layer_norm_eps == 1e-6


def test_configs_that_do_not_fit(hf_folders: dict[str, Path], tmp_path: Path):
    folder = tmp_path / "hf"
    shutil.copytree(hf_folders["Sam3TrackerModel"], folder)
    original = json.loads((folder / "config.json").read_text())

    def attempt(**changes) -> None:
        (folder / "config.json").write_text(json.dumps(original | changes))
        convert(open_source(str(folder)), tmp_path / "ckpt")

    with pytest.raises(ConversionError, match=r"model_type 'llama' is not SAM 3's"):
        attempt(model_type="llama")
    with pytest.raises(ConversionError, match=r"config\.json: expected int, got 'x'"):
        attempt(prompt_encoder_config={"hidden_size": "x"})
    decoder = original["mask_decoder_config"] | {"mlp_dim": 63}
    with pytest.raises(
        ConversionError, match=r"has shape \(64, 128\), the model expects \(63, 128\)"
    ):
        attempt(mask_decoder_config=decoder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConversionError, match=r"config\.json: not JSON"):
        open_source(str(folder))
    assert not (tmp_path / "ckpt").exists()


def test_one_matrix_under_two_names(hf_folders: dict[str, Path], tmp_path: Path):
    """Newer versions of transformers store the Gaussian matrix twice, older ones once."""
    tensors = load_file(hf_folders["Sam3TrackerModel"] / "model.safetensors")
    names = {hf_names.normal_name(name): name for name in tensors}
    copy = names[hf_names.GAUSSIAN_COPY]
    original = names[hf_names.GAUSSIAN]
    matrix = tensors[original]
    for left in (copy, original):
        once = {name: t for name, t in tensors.items() if name not in (copy, original)}
        save_file({**once, left: matrix}, tmp_path / "model.safetensors")
        output = tmp_path / left
        convert(open_source(str(tmp_path / "model.safetensors")), output, config=SMALL)
        params = load(output).params
        np.testing.assert_array_equal(params["tracker"]["prompt_encoder"]["gaussian"], matrix)
    save_file({**tensors, copy: matrix + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=r"shared_image_embedding.* differs from .*of which"):
        convert(open_source(str(tmp_path / "model.safetensors")), tmp_path / "x", config=SMALL)


def test_safetensors_of_half_precision(hf_folders: dict[str, Path], tmp_path: Path):
    tensors = load_file(hf_folders["Sam3TrackerModel"] / "model.safetensors")
    half = {name: torch.from_numpy(t).bfloat16() for name, t in tensors.items()}
    from safetensors.torch import save_file as save_torch

    save_torch(half, tmp_path / "model.safetensors")
    read = open_source(str(tmp_path / "model.safetensors")).tensors
    assert {array.dtype for array in read.values()} == {np.dtype(ml_dtypes.bfloat16)}
    for name, tensor in half.items():
        assert read[name].tobytes() == tensor.view(torch.uint8).numpy().tobytes(), name


def _edit_header(path: Path, change: Callable[[dict], object]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-4]), "b: ValueError ends at byte 24 of 20"),
        (lambda p: p.write_bytes(p.read_bytes()[:30]), "cut off or not a safetensors file"),
        (lambda p: p.write_bytes(b""), "cut off or not a safetensors file"),
        (lambda p: p.write_bytes(b"\xff" * 8 + b"{" + bytes(99)), "cut off or not"),
        (lambda p: _edit_header(p, lambda h: h["a"].update(shape=[9])), "a: ValueError shape"),
        (lambda p: _edit_header(p, lambda h: h["a"].update(dtype="F8_E4M3")), "a: KeyError 'F8"),
        (
            lambda p: _edit_header(p, lambda h: h["a"].update(data_offsets=[-16, 0])),
            "a: ValueError",
        ),
        (lambda p: _edit_header(p, lambda h: h["a"].pop("shape")), "a: KeyError 'shape'"),
        (lambda p: _edit_header(p, lambda h: h.clear()), "holds no tensors"),
        (lambda p: p.write_bytes((4).to_bytes(8, "little") + b"{]}}"), "header is damaged"),
    ],
)
def test_damaged_safetensors(damage: Callable[[Path], object], message: str, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones(4, np.float32), "b": np.ones(2, np.float32)}, path)
    damage(path)
    with pytest.raises(ConversionError, match=rf"model\.safetensors.*(?s:.*){message}"):
        open_source(str(path))


@pytest.mark.parametrize(
    "name",
    [
        "tracker.model.sam_mask_decoder.mask_tokens.weight",
        "detector.backbone.vision_backbone.interactive_convs.0.conv_1x1.bias",
        "detector.backbone.vision_backbone.propagation_convs.0.conv_1x1.bias",
        "tracker_model.interactive_sam_prompt_encoder.no_mask_embed.weight",
    ],
)
def test_sam_31_is_recognised(name: str, convert_release: Callable):
    with pytest.raises(
        ConversionError, match=r"holds SAM 3\.1 \(object multiplex\).*converts SAM 3"
    ):
        convert_release(lambda state: state.update({name: torch.zeros(1)}))


def test_the_names_of_sam_3_are_not_taken_for_those_of_31():
    for layout in (release_layout(SMALL), *(hf_layout(name, SMALL) for name in BUILD)):
        names = [row.source for row in layout.rows] + [item.source for item in layout.unused]
        assert not hf_names.is_multiplex([*names, *layout.copies])


def test_other_models_are_refused(tmp_path: Path):
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ConversionError, match=r"other\.pt: .*not named like.*'layer\.weight'"):
        convert(open_source(str(tmp_path / "other.pt")), tmp_path / "ckpt")


def test_folders_that_hold_no_weights(release: dict, convert_release: Callable, tmp_path: Path):
    def attempt(message: str) -> None:
        with pytest.raises(ConversionError, match=message):
            open_source(str(tmp_path / "folder"))

    attempt("no such file or folder")
    (tmp_path / "folder").mkdir()
    attempt("neither model.safetensors nor sam3.pt")
    (tmp_path / "folder" / "pytorch_model.bin").write_bytes(b"")
    attempt("are pickles, which are not read.*save_pretrained")
    for name in ("a", "b"):
        save_file({"a": np.ones(1)}, tmp_path / "folder" / f"{name}.safetensors")
    attempt(r"holds a\.safetensors, b\.safetensors and no .*index.*give one")
    (tmp_path / "other").mkdir()
    torch.save(release, tmp_path / "other" / "sam3.pt")
    assert len(open_source(str(tmp_path / "other")).tensors) == len(release)
    convert_release()
    with pytest.raises(ConversionError, match="converted already.*--to-torch or --to-hf"):
        open_source(str(tmp_path / "ckpt"))


def test_hub_ids(hf_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    def download(name: str, allow_patterns: list[str]) -> str:
        assert name == "someone/sam3"
        assert "config.json" in allow_patterns
        assert not any("bin" in pattern or ".pt" in pattern for pattern in allow_patterns)
        return str(hf_folders["Sam3Model"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert "detr_decoder.query_embed.weight" in open_source("someone/sam3").tensors
    with pytest.raises(ConversionError, match="no such file or folder"):
        open_source("folder/sam3.pt")

    def fail(name: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no network\nlong story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        ConversionError, match=r"cannot be downloaded \(no network\).*hf auth login"
    ):
        open_source("someone/sam3")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConversionError, match=r"pip install 'sam3_jax\[convert\]'"):
        open_source("someone/sam3")


def test_a_full_disk(convert_release: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(CheckpointError, match=r"needs 0\.01 GB and 0\.00 GB are free"):
        convert_release()
    assert [path.name for path in tmp_path.iterdir()] == ["sam3.pt"]


def test_the_command(release: dict, tmp_path: Path, capsys: pytest.CaptureFixture):
    torch.save({"model": release}, tmp_path / "sam3.pt")
    arguments = ["--input", str(tmp_path / "sam3.pt"), "--output", str(tmp_path / "ckpt")]
    assert cli.main([*arguments, "--config", "tiny"]) == 0
    said = capsys.readouterr()
    assert "M parameters from sam3.pt names, parts image, tracker, " in said.out
    assert "note" not in said.out
    assert cli.main([*arguments, "--config", "tiny"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert cli.main([*arguments, "--config", "tiny", "--part", "image", "--overwrite"]) == 0
    assert load(tmp_path / "ckpt").metadata["parts"] == ["image"]
    assert "belong to parts that were not converted" in capsys.readouterr().out

    assert cli.main(arguments) == 1  # the released sizes
    assert "problems, nothing was written" in capsys.readouterr().err
    assert cli.main([*arguments, "--config", "huge"]) == 1
    assert "--config huge: neither sam3, demo, tiny nor readable" in capsys.readouterr().err
    sizes = dataclasses.asdict(config.tiny())
    (tmp_path / "sizes.json").write_text(json.dumps(sizes))
    assert cli.main([*arguments, "--config", str(tmp_path / "sizes.json"), "--overwrite"]) == 0
    with pytest.raises(SystemExit, match="2"):
        cli.main(["--output", "x"])
    with pytest.raises(SystemExit, match="2"):
        cli.main([*arguments, "--to-torch", "--part", "image"])
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    assert "--to-hf Sam3VideoModel" in capsys.readouterr().out


def run_code(code: str, arguments: str, folder: Path) -> subprocess.CompletedProcess:
    """Runs Python code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments.split()],
        cwd=folder,
        env={"PYTHONPATH": str(Path(__file__).parents[1]), "JAX_PLATFORMS": "cpu", "PATH": ""},
        capture_output=True,
        text=True,
    )


def test_the_command_without_torch(release: dict, tmp_path: Path):
    """Neither torch nor what brings it along is there."""
    torch.save(release, tmp_path / "sam3.pt")
    code = """
import sys
class Absent:
    def find_spec(self, name, path, target=None):
        if name in ("torch", "safetensors", "transformers", "huggingface_hub"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from sam3_jax.convert.cli import main
sys.exit(main(sys.argv[1:]))
"""
    done = run_code(code, "--input sam3.pt --output ckpt --config tiny", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert load(tmp_path / "ckpt").metadata["parts"] == ["image", "tracker"]


def test_a_killed_command_leaves_nothing(release: dict, tmp_path: Path):
    """SIGTERM arrives in the middle of writing."""
    torch.save(release, tmp_path / "sam3.pt")
    code = """
import os, signal, sys
from sam3_jax.checkpoint import saving
saving.GROUP_BYTES = 2**16
write = saving.ocp.partial.save
def killed(folder, tree):
    write(folder, tree)
    print(sorted(os.listdir(".")))
    os.kill(os.getpid(), signal.SIGTERM)
saving.ocp.partial.save = killed
from sam3_jax.convert.cli import main
sys.exit(main(sys.argv[1:]))
"""
    done = run_code(code, "--input sam3.pt --output ckpt --config tiny", tmp_path)
    assert done.returncode == 143, done.stderr
    assert ".partial" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["sam3.pt"]

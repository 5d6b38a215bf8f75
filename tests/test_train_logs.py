"""What a training run says of itself, and the arithmetic that its speed is measured by."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import struct
import types
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec
from PIL import Image

import tiny_predictor
from sam3_jax import config as configs
from sam3_jax.models.detector import init_shapes
from sam3_jax.models.vit import VisionTransformer
from sam3_jax.ops.attention import attention
from sam3_jax.sharding import make_mesh
from sam3_jax.trainer import flops, logs
from sam3_jax.trainer.config import LogConfig
from sam3_jax.trainer.flops import count_flops, forward_flops, peak_flops, train_flops
from sam3_jax.trainer.logs import RunLog, read_log
from sam3_jax.training.clicks import ClickConfig
from sam3_jax.training.targets import LossConfig

# -- Arithmetic --------------------------------------------------------------------------------


def shape(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


A, B = shape(3, 5), shape(5, 7)
AB = 2 * 3 * 5 * 7  # of A @ B


def conv(x, kernel, **options):
    names = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, dimension_numbers=names, **options)


@jax.custom_vjp
def custom(a, b):
    return a @ b


custom.defvjp(lambda a, b: (a @ b, (a, b)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


def scanned(a, b):
    return lax.scan(lambda c, _: (c, c @ b), a, None, length=11)[1]


def looped(a, b):
    return lax.fori_loop(0, 4, lambda i, total: total + a @ b, jnp.zeros((3, 7)))


def chosen(a, b):
    return lax.cond(a.sum() > 0, lambda: a @ b, lambda: 2 * (a @ b) + a @ b)


def sharded(a, b):
    mesh, whole = make_mesh(), PartitionSpec()
    rows = PartitionSpec("data")
    f = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    return f(jnp.concatenate([a] * 8), b)


@pytest.mark.parametrize(
    ("f", "args", "expected"),
    [
        (jnp.matmul, (A, B), AB),
        (lambda a, b: (a @ b, a + 1)[1], (A, B), 0),  # dead code
        (
            lambda x, y: jnp.einsum("bnhd,bmhd->bhnm", x, y),
            (shape(2, 3, 4, 5), shape(2, 6, 4, 5)),
            2 * 2 * 4 * 3 * 6 * 5,
        ),
        (
            lambda x, k: conv(x, k, window_strides=(2, 2), padding="VALID"),
            (shape(2, 9, 9, 4), shape(3, 3, 4, 6)),
            2 * (2 * 4 * 4 * 6) * (3 * 3 * 4),
        ),
        (
            lambda x, k: conv(x, k, window_strides=(1, 1), padding="SAME", feature_group_count=4),
            (shape(1, 5, 5, 4), shape(3, 3, 1, 8)),
            2 * (5 * 5 * 8) * (3 * 3),
        ),
        (scanned, (shape(3, 5), shape(5, 5)), 11 * 2 * 3 * 5 * 5),
        (lambda a, b: lax.map(lambda row: row @ b, a), (A, B), AB),
        (looped, (A, B), 4 * AB),
        (chosen, (A, B), 2 * AB),
        (jax.jit(jax.checkpoint(lambda a, b: custom(a, b) + 1)), (A, B), AB),
        (jax.vmap(jnp.dot, in_axes=(None, 0)), (A, shape(4, 5, 7)), 4 * AB),
        (jax.grad(lambda a, b: (a @ b).sum()), (A, B), AB),  # b's alone; the forward is dead
        (sharded, (A, B), 8 * AB),
    ],
    ids="matmul dead einsum conv groups scan map loop cond calls vmap grad shard_map".split(),
)
def test_counts_by_hand(f, args, expected):
    assert count_flops(f, *args)[0] == expected


def test_shapes_come_along():
    assert count_flops(lambda a, b: {"x": a @ b}, A, B)[1]["x"].shape == (3, 7)


def test_what_cannot_be_counted_is_refused():
    def unknown(a, b):
        return lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ b, a)

    def kernel(x, out):
        out[...] = x[...]

    with pytest.raises(ValueError, match="while loop"):
        count_flops(unknown, A, shape(5, 5))
    with pytest.raises(ValueError, match="pallas_call"):
        count_flops(pl.pallas_call(kernel, out_shape=shape(8, 128)), shape(8, 128))
    # A search that multiplies nothing is no arithmetic.
    assert count_flops(lambda a: lax.while_loop(lambda c: c < 9, lambda c: c + 1, a), 0)[0] == 0


@pytest.mark.parametrize("mesh", [False, True], ids=["one", "mesh"])
def test_attention_counts_the_same_everywhere(mesh):
    b, n, m, h, d = 8, 1024, 600, 2, 16  # scores of a flash kernel's size
    q, k = shape(b, n, h, d, dtype=jnp.bfloat16), shape(b, m, h, d, dtype=jnp.bfloat16)
    with jax.set_mesh(make_mesh()) if mesh else contextlib.nullcontext():
        assert count_flops(attention, q, k, k)[0] == 4 * b * n * m * h * d


@pytest.mark.parametrize("name", ["tiny", "sam3"])
def test_trunk_against_its_formula(name):
    config = configs.NAMED[name]()
    vit, side = config.vision, config.image_size // config.vision.patch_size
    n, d = side**2, vit.dim
    products = 2 * n * (4 * d * d + 2 * d * vit.mlp_dim)  # q, k, v, out and the MLP
    seen = [n if i in vit.global_blocks else vit.window_size**2 for i in range(vit.depth)]
    expected = 2 * n * 3 * vit.patch_size**2 * d + vit.depth * products
    expected += sum(4 * n * keys * d for keys in seen)

    module = VisionTransformer(vit, jnp.bfloat16)
    pixels = shape(1, config.image_size, config.image_size, 3)
    small = shape(1, 2 * vit.patch_size, 2 * vit.patch_size, 3)
    params = jax.eval_shape(module.init, jax.random.key(0), small)
    assert count_flops(module.apply, params, pixels)[0] == expected
    if name == "sam3":
        assert expected == pytest.approx(5.4e12, rel=0.01)


@pytest.fixture(scope="module")
def one() -> Iterator[float]:
    """Of one image with one phrase; the parameters' shapes, half of the work, are traced once."""
    shapes = init_shapes(tiny_predictor.config())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flops, "init_shapes", lambda config: shapes)
        yield forward_flops(tiny_predictor.config(), 1, 1)


def test_forward_of_the_detector(one):
    config = tiny_predictor.config()
    # A second phrase of the same image does not encode it again.
    two = forward_flops(config, 1, 2)
    assert one < two < 2 * one
    # Heads: the mask head alone multiplies 12 + 12 queries with a map of 32 x 32.
    no_masks = LossConfig(masks=False, semantic=False)
    assert train_flops(config, 1, 1, loss=no_masks) < 3 * (one - 2 * 24 * 32 * 32 * config.dim)
    # The decoder's first layer reads the same boxes for all prompts.
    assert 0.99 * 3 * 3 * two < train_flops(config, 3, 6) < 3 * 3 * two


def test_forward_with_clicks(one):
    config, objects = tiny_predictor.config(), 2
    clicks = ClickConfig(weight=1.0, corrections=3)
    more = forward_flops(config, 1, 1, clicks=clicks, objects=objects) - one
    # Each of the four rounds enlarges the map of 8 x 8 twice, for each object.
    d = config.dim
    enlarge = 2 * 64 * d * (4 * d // 4) + 2 * 256 * (d // 4) * (4 * d // 8)
    assert more > 4 * objects * enlarge
    # Alone, the two necks cost the same; text, fusion, decoder and masks are left out.
    alone = dataclasses.replace(clicks, alone=True)
    less = forward_flops(config, 1, 1, clicks=alone, objects=objects)
    assert more < less < one + more
    assert less == forward_flops(config, 1, 2, clicks=alone, objects=objects)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("TPU v9", None),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(kind) == peak


# -- Log ---------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def time(self) -> float:
        return 1e9 + self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(logs, "time", clock)
    return clock


def open_log(folder: Path, *, start: int = 0, **options) -> RunLog:
    settings = {"every": 2, "tensorboard": False, **options.pop("config", {})}
    values = {"steps": 10, "images_per_step": 8, "flops_per_step": 1e12, **options}
    return RunLog(folder, LogConfig(**settings), start=start, **values)


def run(log: RunLog, clock: Clock, first: int, last: int, *, loss: float = 1.0) -> None:
    """Steps of half a second, a tenth of it waiting."""
    for step in range(first, last + 1):
        clock.now += 0.5
        log.step(step, {"loss": loss * step, "skipped": float(step)}, waited=0.05)


def lines_of(folder: Path, kind: str) -> list[dict]:
    return [line for line in read_log(folder / "log.jsonl") if line["kind"] == kind]


def test_means_of_a_window(tmp_path, clock, monkeypatch):
    # Eight devices of 25e12: 200 steps of 1e12 a second at best.
    monkeypatch.setattr(logs, "peak_flops", lambda kind: 25e12)
    with contextlib.closing(open_log(tmp_path)) as log:
        clock.now += 30  # the first step compiles
        log.step(1, {"loss": 8.0, "rate": 0.1}, waited=3.0)
        clock.now += 0.5
        log.step(2, {"loss": 6.0, "rate": 0.2}, waited=0.1)
        run(log, clock, 3, 10)
    raw = [json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert raw[0]["schema_version"] == 1
    assert raw[0]["kind"] == "start"
    assert [line["step"] for line in raw[1:]] == [2, 4, 6, 8, 10]
    assert raw == read_log(tmp_path / "log.jsonl")
    time, line = raw[1].pop("time"), raw[1]
    assert time == 1e9 + 130.5
    assert line == {
        "kind": "train",
        "step": 2,
        "steps": 2,
        "loss": 7.0,
        "rate": 0.2,
        "step_s": 0.5,
        "images_per_s": 16.0,
        "data_wait": pytest.approx(0.2),
        "mfu": pytest.approx(2 / 200),
        "compile_s": 30.0,
    }
    assert raw[2]["loss"] == 3.5
    assert raw[2]["skipped"] == 4
    assert raw[2]["compile_s"] == 0


def test_numbers_that_are_not_finite(tmp_path, clock):
    with contextlib.closing(open_log(tmp_path)) as log:
        for step, loss in enumerate((1.0, float("nan"), float("inf"), float("nan")), 1):
            clock.now += 1
            log.step(step, {"loss": loss}, waited=0.0)
        log.figures(4, {"cgF1": float("nan"), "AP": 0.5})
    assert [line["loss"] for line in lines_of(tmp_path, "train")] == [1.0, None]
    assert lines_of(tmp_path, "train")[1]["mfu"] is None  # a CPU's peak is not known
    figures = lines_of(tmp_path, "valid")[0]
    assert (figures["step"], figures["cgF1"], figures["AP"]) == (4, None, 0.5)
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()


def test_compiling_and_pauses_are_not_step_time(tmp_path, clock):
    def new_program() -> None:
        jax.jit(lambda x: x + 1)(np.ones(3)).block_until_ready()

    with contextlib.closing(open_log(tmp_path)) as log:
        run(log, clock, 1, 2)
        clock.now += 7  # another size of batch
        new_program()
        log.step(3, {"loss": 1.0}, waited=0.0)
        with log.pause():
            clock.now += 1000
            new_program()
        run(log, clock, 4, 4)
    line = lines_of(tmp_path, "train")[1]
    assert (line["step"], line["compile_s"], line["step_s"]) == (4, 7.0, 0.5)


def test_a_window_without_timed_steps(tmp_path, clock, capsys):
    with contextlib.closing(open_log(tmp_path, config={"every": 1})) as log:
        run(log, clock, 1, 1)
    line = lines_of(tmp_path, "train")[0]
    assert [line[name] for name in ("step_s", "images_per_s", "data_wait")] == [None] * 3
    assert "step 1/10: loss 1, compiled 0 s, 1 skipped" in capsys.readouterr().err


def test_resume_supersedes_what_was_lost(tmp_path, clock):
    with contextlib.closing(open_log(tmp_path)) as log:
        run(log, clock, 1, 7)
        log.figures(6, {"AP": 0.1})
    before = (tmp_path / "log.jsonl").read_bytes()
    with contextlib.closing(open_log(tmp_path, start=5)) as log:
        run(log, clock, 6, 10, loss=-1.0)
    assert (tmp_path / "log.jsonl").read_bytes().startswith(before)
    train = lines_of(tmp_path, "train")
    assert [(line["step"], line["loss"]) for line in train] == [
        (2, 1.5),
        (4, 3.5),
        (6, -6.0),
        (8, -7.5),
        (10, -9.5),
    ]
    assert [line["step"] for line in lines_of(tmp_path, "start")] == [0, 5]
    assert lines_of(tmp_path, "valid") == []
    open_log(tmp_path).close()  # from the start: nothing of it counts any more
    assert [line["kind"] for line in read_log(tmp_path / "log.jsonl")] == ["start", "start"]


def test_a_torn_line_is_cut(tmp_path, clock):
    path = tmp_path / "log.jsonl"
    open_log(tmp_path).close()
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    assert len(read_log(path)) == 1
    with contextlib.closing(open_log(tmp_path, start=2)) as log:
        run(log, clock, 3, 4)
    assert [line["step"] for line in read_log(path)] == [0, 2, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]\n", "line 1: not of a training log"),
        ('{"kind": "train", "step": 2}\n', "line 1: not of a training log"),
        ('{"kind": "start", "step": 0, "schema_version": 9}\n', "schema_version 9, not 1"),
    ],
)
def test_foreign_files_are_refused(tmp_path, text, message):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_log(tmp_path / "log.jsonl")


def test_close_writes_what_is_left(tmp_path, clock):
    log = open_log(tmp_path, config={"every": 100})
    run(log, clock, 1, 3)
    log.close()
    log.close()
    assert [(line["step"], line["steps"]) for line in lines_of(tmp_path, "train")] == [(3, 3)]


def test_other_processes_write_nothing(tmp_path, clock):
    config = {"tensorboard": True, "profile_start": 1}
    with contextlib.closing(open_log(tmp_path, active=False, config=config)) as log:
        with log.profile(1), log.pause():
            pass
        run(log, clock, 1, 10)
        log.figures(10, {"AP": 1.0})
        log.picture(10, "a", np.zeros((2, 2, 3), np.uint8))
        log.settings({"a": 1})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's full device")
def test_a_full_disk_names_the_file(tmp_path, clock):
    path = tmp_path / "log.jsonl"
    log = open_log(tmp_path)
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"log\.jsonl") as caught:
        run(log, clock, 1, 2)
    assert caught.value.errno == errno.ENOSPC
    log.close()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress(tmp_path, clock, monkeypatch, capsys):
    with contextlib.closing(open_log(tmp_path)) as log:
        run(log, clock, 1, 4)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 0/10: compiling the first step"
    expected = "loss 3.5, 0.5 s/step, 16 images/s, data wait 10%, left 00:03"
    assert lines[2] == f"step 4/10: {expected}, 4 skipped"

    monkeypatch.setattr("sys.stderr", Terminal())
    with contextlib.closing(open_log(tmp_path)) as log:
        run(log, clock, 1, 4)
        shown = logs.sys.stderr.getvalue()
    assert "compiling the first step" in shown
    assert f"4/10 [00:00, {expected}" in shown
    assert "step 4/10" not in shown


# -- TensorBoard and the profiler --------------------------------------------------------------


def read_events(path: Path) -> list:
    """Records: length, its checksum, event, its checksum."""
    from tensorboardX.proto import event_pb2

    data, events = path.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        data = data[12 + size + 4 :]
    return events


def test_tensorboard(tmp_path, clock, rng):
    image = rng.integers(0, 256, (6, 9, 3)).astype(np.uint8)
    with contextlib.closing(open_log(tmp_path, start=4, config={"tensorboard": True})) as log:
        log.settings({"steps": 10, "optimizer": {"ema": 0.5}})
        run(log, clock, 5, 6)
        log.figures(6, {"segm/cgF1": 0.25, "segm/pmF1": float("nan")})
        log.picture(6, "valid/cat", image)
        # Before it is closed: a run that is killed leaves them too.
        (path,) = tmp_path.glob("events.out.tfevents.*")
        events = read_events(path)
    assert events[0].file_version == "brain.Event:2"
    assert (events[1].session_log.status, events[1].step) == (1, 5)  # hides what was from step 5 on
    values = {v.tag: (e.step, v) for e in events for v in e.summary.value}
    step, value = values["train/loss"]
    assert (step, value.simple_value) == (6, 5.5)
    assert values["train/step_s"][1].simple_value == 0.5
    assert values["valid/segm/cgF1"][1].simple_value == 0.25
    assert not {"valid/segm/pmF1", "train/mfu"} & set(values)
    picture = values["valid/cat"][1].image.encoded_image_string
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(picture))), image)
    text = values["settings/text_summary"][1].tensor.string_val[0].decode()
    assert '"ema": 0.5' in text


def test_without_tensorboard(tmp_path, clock):
    with contextlib.closing(open_log(tmp_path)) as log:
        log.picture(0, "a", np.zeros((2, 2, 3), np.uint8))
        log.settings({"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_profile_window(tmp_path, clock, monkeypatch):
    calls = []
    fake = types.SimpleNamespace(
        start_trace=lambda folder: calls.append(("start", folder)),
        stop_trace=lambda: calls.append(("stop",)),
        StepTraceAnnotation=lambda name, step_num: contextlib.nullcontext(step_num),
    )
    monkeypatch.setattr(jax, "profiler", fake)
    config = {"profile_start": 3, "profile_steps": 2}
    with contextlib.closing(open_log(tmp_path, config=config)) as log:
        marked = []
        for done in range(8):
            with log.profile(done) as step:
                marked.append(step)
            calls.append(done)
            if done:  # metrics are read one step late
                run(log, clock, done, done)
    start = ("start", tmp_path / "profile")
    assert calls == [0, 1, 2, start, 3, 4, 5, ("stop",), 6, 7]
    assert marked == [None, None, None, 4, 5, 6, None, None]


def test_a_real_trace_ends_with_the_run(tmp_path):
    log = open_log(tmp_path, config={"profile_start": 1, "profile_steps": 100})
    for done in range(3):
        with log.profile(done):
            jnp.ones(3).block_until_ready()
        log.step(done + 1, {"loss": 1.0}, waited=0.0)
    log.close()
    assert list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))

"""Tracking in videos: this project and transformers side by side, in one run.

    python benchmarks/video.py --quick                                # tiny model, minutes
    python benchmarks/video.py --part tracker                         # released size, no backbone
    python benchmarks/video.py --json benchmarks/results/video.json   # released size
    python benchmarks/video.py --tpu                                  # v5e, compiled, none needed

Both sides load the same seeded random weights and follow objects that were pointed at on the
first frame. transformers' is ``Sam3TrackerVideoModel``, fed frame by frame. Every row is measured
in a process of its own, after so many frames that memory is full:

- ``track``: a frame whose features are there, all objects, from memory attention to the new memory;
  ours reads only as many prompted frames as there are (one here);
- ``chunk`` (ours): the same by ``track_chunk``, several frames in one program, which has room for
  all prompted frames that may be read;
- ``frame``: a frame of a session, from pixels to masks at the video's size, backbone included; on
  a GPU beside the frames a second that were published for an H100, and the goals;
- ``rss``: resident memory after so many frames of a tiny session, two objects.

"--part tracker" leaves the backbone out; its model has one block of it, so that it needs 1 GB.
"--tpu" compiles a frame of tracking (``tracking.step.track``) of the released size in bfloat16
ahead of time: memory and FLOPs a chip, which do not count what Pallas kernels (attention) do. It
takes the ``libtpu`` wheel. A case is DEVICE:CHIPS:OBJECTS. As in sessions, chips share a bucket of
16 objects (rounded up to a multiple of the chips; fewer where there are fewer). More objects are
more calls, one a bucket: FLOPs and GB moved are of all of them, ``total_gb`` is of one call and the
states of the other buckets.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

if not __package__:  # run as a script: the benchmarks beside it are imported by their full name
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.image import check_finite, peak_gb, random_params, repair_torchvision

JAX, TORCH = "sam3_jax", "transformers"
CHECKPOINT, HF = "checkpoint", "hf"
CHUNK = 4
PUBLISHED = {1: 26.5, 2: 23.8, 4: 19.7, 8: 14.6, 16: 9.8, 32: 5.8, 64: 3.0}  # FPS on an H100
GOALS = {1: 40.0, 16: 16.0, 64: 5.0}
TPU_CASES = ("v5e:1:16", "v5e:1:64", "v5e:4:64")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def model_config(size: str) -> Any:
    """Configuration of a named size; "tracker" is the released one with a backbone of one block."""
    from sam3_jax import config

    if size == "sam3":
        return config.sam3()
    if size == "tiny":  # transformers fixes the memory's width
        tiny = config.tiny()
        return dataclasses.replace(tiny, dim=128, memory=dataclasses.replace(tiny.memory, dim=64))
    model = config.sam3()
    model.vision.depth, model.vision.global_blocks = 1, (0,)
    model.text.depth = 1
    return model


def write_weights(folder: Path, size: str) -> None:
    """Seeded weights, in our form and transformers'; objects are mostly present."""
    from sam3_jax import checkpoint
    from sam3_jax.convert.export import write_hf

    model = model_config(size)
    params = random_params(model)
    head = params["tracker"]["mask_decoder"]["object_head"]
    head[max(head)]["bias"] = head[max(head)]["bias"] + 4.0
    checkpoint.save(folder / CHECKPOINT, params, model)
    write_hf(folder / HF, params, {}, model, "Sam3TrackerVideoModel")


def pictures(side: int) -> Iterator[np.ndarray]:
    """An endless video of noise."""
    rng = np.random.default_rng(1)
    shown = rng.integers(0, 255, (4, side, side, 3)).astype(np.uint8)
    return itertools.cycle(shown)


def points(objects: int, side: int) -> np.ndarray:
    """One a object, (n, 2)."""
    return np.random.default_rng(2).uniform(0.1 * side, 0.9 * side, (objects, 2))


def seconds(step: Callable[[], Any], warm: int, frames: int) -> float:
    """Median time of ``frames`` calls after ``warm`` others."""
    times = []
    for _ in range(warm + frames):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm:])


class JaxSide:
    """Our sessions in this process."""

    def __init__(self, folder: Path, dtype: str):
        import jax

        from sam3_jax.video.predictor import VideoPredictor

        self.jax = jax
        jax.config.update("jax_compilation_cache_dir", str(folder / "xla_cache"))
        self.predictor = VideoPredictor.from_pretrained(folder / CHECKPOINT, dtype=dtype)
        self.side = self.predictor.engine.config.image_size
        self.device = jax.devices()[0].device_kind

    def session(self, objects: int) -> Iterator[Any]:
        """Frames of a stream with so many objects."""
        session = self.predictor.start(pictures(self.side))
        for point in points(objects, self.side):
            session.add_points(0, [point])
        return session.propagate()

    def frame(self, objects: int, warm: int, frames: int) -> dict[str, Any]:
        shown = self.session(objects)
        return {"frame_s": seconds(lambda: next(shown), warm, frames)}

    def track(self, objects: int, warm: int, frames: int) -> dict[str, Any]:
        """Buckets as a session has them, on random features."""
        from sam3_jax.tracking.memories import frame_at
        from sam3_jax.video.buckets import Buckets

        jax, predictor = self.jax, self.predictor
        programs, params = predictor._programs, predictor.engine.params
        buckets = Buckets(programs, params)
        buckets.reserve(objects)
        buckets.add(np.arange(objects), np.zeros(objects, np.int32))
        levels = self._levels()
        rng = np.random.default_rng(3)
        rows = np.arange(buckets.rows).reshape(-1, buckets.size) < objects
        said = [
            buckets.nothing._replace(
                masks=rng.standard_normal(buckets.nothing.masks.shape, np.float32),
                object_logits=np.full(buckets.size, 10.0, np.float32),
            )
            for _ in rows
        ]
        buckets.prompt(levels, frame_at(0), dict(enumerate(said)), dict(enumerate(rows)))
        number = itertools.count(1)

        def step() -> None:
            found = buckets.track(levels, frame_at(next(number)))
            jax.block_until_ready(found)

        row = {"track_s": seconds(step, warm, frames)}
        check_finite(np.asarray(buckets.states[0].pointers), JAX)
        several = tuple(jax.numpy.concatenate([level] * CHUNK) for level in levels)

        def chunk() -> None:
            first = frame_at(CHUNK * next(number) + 1000)
            for i, state in enumerate(buckets.states):
                buckets.states[i], found = programs.track_chunk(params, state, several, first)
            jax.block_until_ready(found)

        if objects % buckets.size == 0:  # it has no narrow form
            row["chunk_s"] = seconds(chunk, 1, max(1, frames // CHUNK)) / CHUNK
        return row | {"state_mb": predictor.state_bytes(objects).session / 1e6}

    def _levels(self) -> tuple:
        config = self.predictor.engine.config
        grid, dim = config.image_size // config.vision.patch_size, config.dim
        shapes = (4 * grid, dim // 8), (2 * grid, dim // 4), (grid, dim)
        rng = np.random.default_rng(1)
        made = [rng.standard_normal((1, side, side, c), np.float32) for side, c in shapes]
        return tuple(self.jax.numpy.asarray(x, self.predictor.engine.dtype) for x in made)


class TorchSide:
    """transformers' ``Sam3TrackerVideoModel`` in this process."""

    def __init__(self, folder: Path, dtype: str):
        import torch

        repair_torchvision()
        from transformers import Sam3TrackerVideoModel
        from transformers.utils import logging

        logging.set_verbosity_error()
        self.torch = torch
        self.where = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = getattr(torch, dtype)
        model = Sam3TrackerVideoModel.from_pretrained(folder / HF, dtype=self.dtype)
        self.model = model.to(self.where).eval()
        self.side = self.model.config.image_size
        self.device = torch.cuda.get_device_name() if self.where == "cuda" else "cpu"

    def _asked(self, objects: int) -> Any:
        from transformers.models.sam3_tracker_video.modeling_sam3_tracker_video import (
            Sam3TrackerVideoInferenceSession,
        )

        session = Sam3TrackerVideoInferenceSession(
            video_height=self.side,
            video_width=self.side,
            inference_device=self.where,
            inference_state_device=self.where,
            dtype=self.dtype,
        )
        for i, point in enumerate(points(objects, self.side)):
            given = {
                "point_coords": self.torch.tensor(point, dtype=self.torch.float32)[
                    None, None, None
                ],
                "point_labels": self.torch.ones((1, 1, 1), dtype=self.torch.int32),
            }
            session.add_point_inputs(session.obj_id_to_idx(i), 0, given)
            session.obj_with_new_inputs.append(i)
        return session

    def session(self, objects: int) -> Iterator[Any]:
        """Frames of a stream with so many objects, masks at the video's size on the host."""
        session = self._asked(objects)
        for picture in pictures(self.side):
            pixels = np.moveaxis(picture, -1, 0).astype(np.float32) / 127.5 - 1
            pixels = self.torch.from_numpy(pixels).to(self.where, self.dtype)
            out = self.model(session, frame=pixels)
            masks = self.torch.nn.functional.interpolate(
                out.pred_masks.float(), (self.side, self.side), mode="bilinear"
            )
            yield (masks > 0).cpu().numpy()

    def frame(self, objects: int, warm: int, frames: int) -> dict[str, Any]:
        shown = self.session(objects)
        return {"frame_s": seconds(lambda: next(shown), warm, frames)}

    def track(self, objects: int, warm: int, frames: int) -> dict[str, Any]:
        session, torch = self._asked(objects), self.torch
        vision = self.model.config.vision_config.backbone_config
        grid = vision.image_size // vision.patch_size
        dim = self.model.config.memory_attention_hidden_size
        shapes = (4 * grid, dim // 8), (2 * grid, dim // 4), (grid, dim)
        kind = {"device": self.where, "dtype": self.dtype}
        features = {
            "vision_feats": [torch.randn(side * side, 1, c, **kind) for side, c in shapes],
            "vision_pos_embeds": [torch.randn(side * side, 1, dim, **kind) for side, _ in shapes],
        }
        session.processed_frames = dict.fromkeys(range(warm + frames + 1))
        number = itertools.count()

        def step() -> None:
            index = next(number)
            session.cache.cache_vision_features(index, features)
            out = self.model(session, frame_idx=index)
            if self.where == "cuda":
                torch.cuda.synchronize()
            step.out = out

        step()
        row = {"track_s": seconds(step, warm, frames)}
        check_finite(step.out.object_score_logits.float().cpu().numpy(), TORCH)
        return row


def run_row(side: str, folder: Path, dtype: str, objects: int, timing: tuple, part: str) -> dict:
    """One row of the table of times, in this process."""
    model = (JaxSide if side == JAX else TorchSide)(folder, dtype)
    row = {"side": side, "dtype": dtype, "objects": objects, "device": model.device}
    row |= model.track(objects, *timing)
    if part == "all":
        row |= model.frame(objects, *timing)
        row["fps"] = 1 / row["frame_s"]
    if model.device != "cpu":
        row |= {"published_fps": PUBLISHED.get(objects), "goal_fps": GOALS.get(objects)}
    return row | {"peak_gb": peak_gb()}


def run_memory(side: str, folder: Path, dtype: str, lengths: tuple[int, ...]) -> list[dict]:
    """Resident memory after so many frames, in this process."""
    import psutil

    shown = (JaxSide if side == JAX else TorchSide)(folder, dtype).session(2)
    rows = []
    for number in range(1, max(lengths) + 1):
        next(shown)
        if number in lengths:
            resident = psutil.Process().memory_info().rss / 1e6
            rows.append({"side": side, "frames": number, "rss_mb": resident})
    return rows


def alone(function: Callable, *args: Any) -> Any:
    """Calls a function in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


class TpuCase(NamedTuple):
    """Chips, and how objects come to them in sessions (``video.command.config_of``)."""

    device: str
    chips: int
    objects: int

    @property
    def bucket(self) -> int:
        """Objects of one call."""
        from sam3_jax.tracking.config import TrackerConfig

        sizes = (self.objects, TrackerConfig().bucket_size)
        return min(-(-slots // self.chips) * self.chips for slots in sizes)


def parse_case(text: str) -> TpuCase:
    """DEVICE:CHIPS:OBJECTS."""
    device, chips, objects = text.split(":")
    return TpuCase(device, int(chips), int(objects))


def compile_bucket(case: TpuCase, *, quick: bool) -> dict[str, Any]:
    """Memory and FLOPs a chip of tracking one bucket in a frame, for chips that are not here."""
    from benchmarks import aot  # first: it sets jax up to compile only

    # isort: split
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from sam3_jax.config import sam3
    from sam3_jax.models.detector import init_shapes
    from sam3_jax.sharding import batch_sharding
    from sam3_jax.tracking.config import TrackerConfig
    from sam3_jax.tracking.memories import frame_at
    from sam3_jax.tracking.programs import Programs
    from sam3_jax.tracking.state import empty_state, state_bytes

    mesh = aot.device_mesh(aot.Case(case.device, case.chips, 1, 1))
    model, tracker = sam3(), TrackerConfig(bucket_size=case.bucket)
    programs = Programs(model, tracker, dtype=jnp.bfloat16)
    whole = NamedSharding(mesh, PartitionSpec())
    grid = model.image_size // model.vision.patch_size

    def placed(shapes: Any, where: NamedSharding) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes
        )

    sides = (4 * grid, model.dim // 8), (2 * grid, model.dim // 4), (grid, model.dim)
    levels = tuple(jax.ShapeDtypeStruct((1, s, s, c), jnp.bfloat16) for s, c in sides)
    state = jax.eval_shape(lambda: empty_state(tracker, model, dtype=jnp.bfloat16))
    args = (
        placed(init_shapes(model), whole),
        placed(state, batch_sharding(mesh)),
        placed(levels, whole),
        frame_at(1),
    )
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = programs.track.lower(*args)
    compiled = lowered.compile(compiler_options=aot.QUICK if quick else None)
    of_bucket = state_bytes(tracker, model, dtype=jnp.bfloat16, objects=case.bucket).session / 1e9
    chip = {"chip_gb": aot.MEMORY_GB[case.device], "state_gb": of_bucket}
    return aot.measure(compiled) | chip | {"compile_s": time.perf_counter() - start}


def tpu_row(text: str, bucket: dict[str, Any]) -> dict[str, Any]:
    """A case as calls of its bucket's program, whose figures are given."""
    case = parse_case(text)
    calls = -(-case.objects // case.bucket)
    row = {"case": text, "calls": calls, **bucket}
    row["state_gb"] *= calls
    # The other buckets wait with their states alone.
    row["total_gb"] += bucket["state_gb"] * (calls - 1) / case.chips
    for name in ("tflop", "moved_gb"):
        if row[name] is not None:  # of GPUs nothing is said
            row[name] *= calls
    return row


def compile_cases(cases: Iterable[str], *, quick: bool) -> list[dict[str, Any]]:
    """Rows of the table; a program that several cases share is compiled once."""
    known: dict[tuple, dict[str, Any]] = {}
    rows = []
    for text in cases:
        case = parse_case(text)
        key = case.device, case.chips, case.bucket
        if key not in known:
            known[key] = alone(compile_named, case, quick)
        rows.append(tpu_row(text, known[key]))
        print(table(rows[-1:], TPU).splitlines()[-1], file=sys.stderr, flush=True)
    return rows


TIMES = (
    "side device dtype objects track_s chunk_s frame_s fps published_fps goal_fps peak_gb state_mb"
).split()
MEMORY = ("side", "frames", "rss_mb")
TPU = (
    "case calls arguments_gb outputs_gb temporaries_gb total_gb chip_gb state_gb tflop moved_gb"
    " compile_s"
).split()


def table(rows: list[dict], columns: list[str] | tuple[str, ...]) -> str:
    """Markdown table of all rows."""

    def cell(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else "-" if value is None else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(name)) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the tiny model, less effort (--tpu)")
    parser.add_argument("--part", choices=("all", "tracker"), default="all")
    parser.add_argument("--objects", action="append", type=int, help="default 1, 2, 8, 16")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--warm", type=int, help="frames before timing (default 16; tracker 7)")
    parser.add_argument("--frames", type=int, help="timed frames (default 8; tracker 2)")
    parser.add_argument("--lengths", type=int, nargs="*", default=[10, 50, 200], help="for rss")
    parser.add_argument("--only-jax", action="store_true", help="leave transformers out")
    parser.add_argument("--tpu", action="store_true", help="compile for TPUs instead")
    parser.add_argument("--case", action="append", help="of --tpu, as v5e:4:64")
    parser.add_argument("--workdir", type=Path, help="keep weights and compiled programs")
    parser.add_argument("--json", type=Path, help="where to write; parts not measured stay")
    return parser.parse_args()


def measure_times(args: argparse.Namespace, folder: Path, size: str) -> dict[str, list[dict]]:
    """Both tables; prints them as they grow."""
    gpu = Path("/dev/nvidiactl").exists()
    dtype = args.dtype or ("bfloat16" if gpu else "float32")
    objects = args.objects or (sorted(PUBLISHED) if gpu else [1, 2, 8, 16])
    slow = size == "tracker" and not gpu
    timing = args.warm or (7 if slow else 16), args.frames or (2 if slow else 8)
    sides = [JAX]
    if not args.only_jax and all(map(importlib.util.find_spec, ("torch", "transformers"))):
        sides.append(TORCH)
    times: list[dict] = []
    for count, side in itertools.product(objects, sides):
        times.append(alone(run_row, side, folder, dtype, count, timing, args.part))
        print(table(times[-1:], TIMES).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(times, TIMES) + "\n", flush=True)
    memory: list[dict] = []
    if args.part == "all" and args.lengths:
        for side in sides:
            memory += alone(run_memory, side, folder, dtype, tuple(args.lengths))
        print(table(memory, MEMORY), flush=True)
    return {f"times_{size}": times, f"memory_{size}": memory}


def write(path: Path, parts: dict[str, list[dict]]) -> None:
    """Puts tables that were measured into the file; others in it stay."""
    data = json.loads(path.read_text()) if path.exists() else {}
    measured = {name: rows for name, rows in parts.items() if rows}
    data = {**data, "schema_version": 1, "cores": os.cpu_count(), **measured}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


def main() -> None:
    args = parse_args()
    if args.tpu:
        rows = compile_cases(args.case or TPU_CASES, quick=args.quick)
        print(table(rows, TPU))
        parts = {"tpu": rows}
    else:
        size = "tiny" if args.quick else "tracker" if args.part == "tracker" else "sam3"
        with tempfile.TemporaryDirectory() as temporary:
            folder = (args.workdir or Path(temporary)).absolute() / f"video_{size}"
            if not (folder / HF).exists():
                alone(write_weights, folder, size)
            parts = measure_times(args, folder, size)
    if args.json:
        write(args.json, parts)


def compile_named(case: TpuCase, quick: bool) -> dict[str, Any]:  # noqa: FBT001 (crosses a process)
    """:func:`compile_bucket` as another process calls it."""
    return compile_bucket(case, quick=quick)


if __name__ == "__main__":
    main()

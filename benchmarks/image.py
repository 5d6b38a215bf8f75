"""One image, one phrase: this project and transformers side by side, in one run.

    python benchmarks/image.py --json benchmarks/results/image.json     # released size, minutes
    python benchmarks/image.py --quick                                  # tiny model, seconds

Both sides load the same seeded random weights, written as a checkpoint of ours and as one of
transformers', and take turns, each in a process of its own:

- ``first``: image + text + ground, from pixels and token ids to masks; ``second``: another phrase
  on the same image (text + ground), also as a share of the first;
- ``load``: the checkpoint from the page cache to usable weights;
- ``compile``: our programs, cold, and in a second process with the persistent cache;
- ``peak``: the process's largest resident memory from its start on, loading and compiling included.

Where torch or transformers is missing, only our side is measured. On a GPU there are also batches
(``--batch``, an image and a phrase each) and the share of the arithmetic limit: 6 TFLOP an image
at 800 TFLOP/s, which is what an H100 sustains in bfloat16. ``--checkpoint`` measures, beside all
that, how long a converted checkpoint of yours takes to load.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from sam3_jax.config import ModelConfig

TFLOP_PER_IMAGE = 6.0
TFLOP_PER_SECOND = 800.0
JAX, TORCH = "sam3_jax", "transformers"
CHECKPOINT, HF = "checkpoint", "hf"  # folders of the two forms of the weights
PHRASES = ("cat", "striped red umbrella")
# Both libraries share a GPU: neither may take most of its memory in advance.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def random_params(model: ModelConfig) -> dict:
    """Seeded values under which activations keep their size."""
    import jax

    from sam3_jax.models.detector import init_shapes

    rng = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = rng.standard_normal(leaf.shape, np.float32)
        match path[-1].key:
            case "kernel":
                return values * np.float32(0.5 * leaf.shape[-1] / leaf.size) ** np.float32(0.5)
            case "scale":
                return 1 + 0.1 * values
            case _:
                return 0.1 * values

    return jax.tree_util.tree_map_with_path(draw, init_shapes(model))


def write_weights(folder: Path, size: str) -> None:
    """Seeded weights of a named size, in our form and transformers'."""
    from sam3_jax import checkpoint, config
    from sam3_jax.convert.export import write_hf

    model = config.NAMED[size]()
    params = random_params(model)
    checkpoint.save(folder / CHECKPOINT, params, model)
    write_hf(folder / HF, params, {}, model, "Sam3Model")


class JaxSide:
    """Our model in this process."""

    def __init__(self, folder: Path, dtype: str) -> None:
        import jax
        import jax.numpy as jnp

        from sam3_jax import checkpoint
        from sam3_jax.inference.programs import compiler_options
        from sam3_jax.models.detector import Sam3, empty_geometry
        from sam3_jax.sharding import on_one_device
        from sam3_jax.tokenizer import default_tokenizer

        self.jax = jax
        jax.config.update("jax_compilation_cache_dir", str(folder / "xla_cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        start = time.perf_counter()
        cast = None if dtype == "float32" else jnp.dtype(dtype)
        self.params, self.config, _ = checkpoint.load(
            folder / CHECKPOINT, dtype=cast, parts=("image",), shardings=on_one_device
        )
        jax.block_until_ready(self.params)
        self.load_s = time.perf_counter() - start
        self.tokenize = default_tokenizer()
        model = Sam3(self.config, jnp.dtype(dtype))

        def image(params: Any, pixels: jax.Array) -> Any:
            features = model.apply({"params": params}, pixels, tracker=False, method="encode_image")
            return features.detector

        def ground(params: Any, levels: Any, ids: jax.Array) -> Any:
            text = model.apply({"params": params}, ids, method="encode_text")
            index = jnp.arange(len(ids))
            prompt = empty_geometry(len(ids))
            out = model.apply(
                {"params": params}, levels, text, prompt, index, index, method="ground"
            )
            return out.pred_masks, out.pred_boxes, out.pred_logits, out.presence_logits

        options = compiler_options()
        self.image = jax.jit(image, compiler_options=options)
        self.ground = jax.jit(ground, compiler_options=options)

    def compile(self, batch: int) -> float:
        """Seconds that compiling (or reading the cache) takes."""
        start = time.perf_counter()
        pixels, ids = self._inputs(batch, PHRASES[0])
        image = self.image.lower(self.params, pixels).compile()
        levels = self.jax.eval_shape(self.image, self.params, pixels)
        ground = self.ground.lower(self.params, levels, ids).compile()
        self.image, self.ground = image, ground
        return time.perf_counter() - start

    def _inputs(self, batch: int, phrase: str) -> tuple[Any, Any]:
        pixels = random_pixels(batch, self.config.image_size)
        return self.jax.device_put((pixels, self.tokenize([phrase] * batch)))

    def run(self, batch: int) -> tuple[float, float]:
        """Seconds of the first phrase and of a second one."""
        pixels, ids = self._inputs(batch, PHRASES[0])
        _, others = self._inputs(batch, PHRASES[1])
        self.jax.block_until_ready((pixels, ids, others))
        start = time.perf_counter()
        levels = self.image(self.params, pixels)
        out = self.jax.block_until_ready(self.ground(self.params, levels, ids))
        middle = time.perf_counter()
        self.jax.block_until_ready(self.ground(self.params, levels, others))
        end = time.perf_counter()
        check_finite(np.asarray(out[2]), JAX)
        return middle - start, end - middle

    def device(self) -> str:
        return self.jax.devices()[0].device_kind


class TorchSide:
    """transformers' ``Sam3Model`` in this process."""

    def __init__(self, folder: Path, dtype: str) -> None:
        import torch

        repair_torchvision()
        from transformers import Sam3Model
        from transformers.utils import logging

        from sam3_jax.tokenizer import default_tokenizer

        logging.set_verbosity_error()
        self.torch, self.tokenize = torch, default_tokenizer()
        self.where = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = getattr(torch, dtype)
        start = time.perf_counter()
        self.model = Sam3Model.from_pretrained(folder / HF, dtype=self.dtype).to(self.where).eval()
        self._wait()
        self.load_s = time.perf_counter() - start
        self.side = self.model.config.vision_config.backbone_config.image_size

    def _wait(self) -> None:
        if self.where == "cuda":
            self.torch.cuda.synchronize()

    def _ground(self, image: Any, phrase: str, batch: int) -> Any:
        ids = self.torch.from_numpy(np.asarray(self.tokenize([phrase] * batch), np.int64))
        ids = ids.to(self.where)
        mask = (ids != 0).long()
        out = self.model(vision_embeds=image, input_ids=ids, attention_mask=mask)
        self._wait()
        return out

    def run(self, batch: int) -> tuple[float, float]:
        """Seconds of the first phrase and of a second one."""
        pixels = np.moveaxis(random_pixels(batch, self.side), -1, 1)
        pixels = self.torch.from_numpy(np.ascontiguousarray(pixels)).to(self.where, self.dtype)
        self._wait()
        with self.torch.inference_mode():
            start = time.perf_counter()
            image = self.model.get_vision_features(pixels)
            out = self._ground(image, PHRASES[0], batch)
            middle = time.perf_counter()
            self._ground(image, PHRASES[1], batch)
            end = time.perf_counter()
        check_finite(out.pred_logits.float().cpu().numpy(), TORCH)
        return middle - start, end - middle

    def device(self) -> str:
        return self.torch.cuda.get_device_name() if self.where == "cuda" else "cpu"


def random_pixels(batch: int, side: int) -> np.ndarray:
    """Noise in [-1, 1], (b, side, side, 3)."""
    rng = np.random.default_rng(1)
    return rng.uniform(-1, 1, (batch, side, side, 3)).astype(np.float32)


def check_finite(values: np.ndarray, side: str) -> None:
    """Raises RuntimeError: numbers that are not finite can be slower or faster than real ones."""
    if not np.isfinite(values.astype(np.float32)).all():
        raise RuntimeError(f"{side}: the random weights gave values that are not finite")


def repair_torchvision() -> None:
    """Lets torchvision be imported where its compiled operators do not load (CPU builds)."""
    from torch import library

    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        placeholder = library.Library("torchvision", "DEF")
        box_list = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        placeholder.define(f"nms{box_list}")
        placeholder.define(f"qnms{box_list}")
        repair_torchvision.keep = placeholder  # the definitions live as long as it does
        import torchvision  # noqa: F401


def peak_gb() -> float:
    """Largest resident memory that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on a Mac, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def serve(pipe: Connection, side: str, folder: Path, dtype: str) -> None:
    """A worker: makes one side, then calls its methods as it is told, until told None."""
    try:
        model = (JaxSide if side == JAX else TorchSide)(folder, dtype)
        pipe.send({"load_s": model.load_s, "device": model.device()})
        while (call := pipe.recv()) is not None:
            name, *args = call
            pipe.send(peak_gb() if name == "peak" else getattr(model, name)(*args))
    except Exception as error:
        pipe.send(error)
        raise


class Worker:
    """One side in a process of its own."""

    def __init__(self, side: str, folder: Path, dtype: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, side, folder, dtype))
        self.process.start()
        other.close()
        self.start = self._receive()

    def _receive(self) -> Any:
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __call__(self, *call: Any) -> Any:
        self.pipe.send(call)
        return self._receive()

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


def compare(folder: Path, sides: list[str], dtype: str, batch: int, repeats: int) -> list[dict]:
    """One row a side: the sides run in turns, ``repeats`` times, after one run to warm up."""
    workers = {side: Worker(side, folder, dtype) for side in sides}
    rows = {side: {"side": side, "dtype": dtype, "batch": batch} for side in sides}
    for side, worker in workers.items():
        rows[side] |= worker.start
    rows[JAX]["compile_s"] = workers[JAX]("compile", batch)
    times: dict[str, list] = {side: [] for side in sides}
    for turn in range(repeats + 1):
        for side, worker in workers.items():
            measured = worker("run", batch)
            if turn:
                times[side].append(measured)
    for side, worker in workers.items():
        first, second = (statistics.median(column) for column in zip(*times[side], strict=True))
        rows[side] |= {"first_s": first, "second_s": second, "second_share": second / first}
        rows[side] |= {"images_per_s": batch / first, "peak_gb": worker("peak")}
        if rows[side]["device"] != "cpu":
            limit = batch * TFLOP_PER_IMAGE / TFLOP_PER_SECOND
            rows[side]["share_of_limit"] = limit / first
        worker.close()
    again = Worker(JAX, folder, dtype)
    rows[JAX]["compile_cached_s"] = again("compile", batch)
    again.close()
    if TORCH in rows:
        rows[JAX]["first_vs_transformers"] = rows[JAX]["first_s"] / rows[TORCH]["first_s"]
    return list(rows.values())


COLUMNS = (
    "side dtype batch first_s first_vs_transformers second_s second_share images_per_s "
    "share_of_limit peak_gb load_s compile_s compile_cached_s"
).split()


def table(rows: list[dict]) -> str:
    """Markdown table of all rows."""

    def cell(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else "-" if value is None else str(value)

    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell(row.get(name)) for name in COLUMNS) + " |" for row in rows]
    return "\n".join(lines)


def load_seconds(path: Path) -> float:
    """Loads a checkpoint twice and times the second, for which its files are in the page cache."""
    from sam3_jax import checkpoint

    for _ in range(2):
        start = time.perf_counter()
        loaded = checkpoint.load(path)
        seconds = time.perf_counter() - start
        del loaded
    return seconds


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the tiny model instead of SAM 3")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", action="append", type=int, help="default 1; on a GPU 1 and 8")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs a side (median)")
    parser.add_argument("--only-jax", action="store_true", help="leave transformers out")
    parser.add_argument("--workdir", type=Path, help="keep weights (7 GB) and compiled programs")
    parser.add_argument("--checkpoint", type=Path, help="time the loading of this one as well")
    parser.add_argument("--json", type=Path, help="where to write the results")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    size = "tiny" if args.quick else "sam3"
    gpu = Path("/dev/nvidiactl").exists()
    dtypes = args.dtype or (["bfloat16"] if gpu else ["float32", "bfloat16"])
    sides = [JAX]
    if not args.only_jax and all(map(importlib.util.find_spec, ("torch", "transformers"))):
        sides.append(TORCH)
    result: dict[str, Any] = {"schema_version": 1, "size": size, "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.workdir or Path(temporary)).absolute() / size
        if not (folder / HF).exists():
            context = multiprocessing.get_context("spawn")
            writer = context.Process(target=write_weights, args=(folder, size))
            writer.start()
            writer.join()
            if writer.exitcode:
                raise SystemExit(f"could not write the weights to {folder}")
        result["rows"] = []
        for dtype in dtypes:
            for batch in args.batch or ([1, 8] if gpu else [1]):
                result["rows"] += compare(folder, sides, dtype, batch, args.repeats)
                print(table(result["rows"]), flush=True)
    if args.checkpoint:
        result["checkpoint_load_s"] = load_seconds(args.checkpoint)
        print(f"{args.checkpoint}: loaded in {result['checkpoint_load_s']:.1f} s")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Bulk labelling: pictures a second of the whole pipeline against the model alone.

    python benchmarks/bulk.py --json benchmarks/results/bulk.json
    python benchmarks/bulk.py --size sam3 --pictures 4     (full size; minutes on a CPU)

The pipeline decodes JPEGs, resizes, runs the model, reads back, resizes masks, encodes them and
writes overlays and results; the model alone runs the same batches on inputs that are there already.
Their ratio is the pipeline's efficiency; it says little where model and pipeline share a few cores.
So the third figure is the pipeline with a model that takes no time (outputs that are there
already): what it can sustain on this machine, and the CPU time a picture of all its threads. The
pictures are photographs of scikit-image at several sizes; thresholds are set so that about ten
instances a picture stay. Weights are random, which makes ragged masks of half the picture: more
work than real ones.

Before that come two tables without any model: the post-processing of a 4K picture with 200 masks,
seconds and the growth of the process's peak memory; and milliseconds of one core a picture by
stage, for the same photographs with ten masks of the released model's size each.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

SIDES = (640, 1024, 1280)
INSTANCES = 10


def write_pictures(folder: Path, count: int) -> list[Path]:
    """Photographs as JPEGs with sides as people have them."""
    import PIL.Image
    import skimage.data

    sources = [skimage.data.coffee(), skimage.data.chelsea(), skimage.data.astronaut()]
    folder.mkdir(parents=True)
    paths = []
    for i in range(count):
        side = SIDES[i % len(SIDES)]
        path = folder / f"{i:05d}.jpg"
        picture = PIL.Image.fromarray(sources[i % 3]).resize((side, side * 3 // 4))
        picture.save(path, quality=90)
        paths.append(path)
    return paths


def make_engine(size: str, dtype: str) -> Any:
    """The model of a named size with random weights on all devices."""
    import jax

    from sam3_jax import config
    from sam3_jax.inference.engine import Engine
    from sam3_jax.models.detector import init_shapes
    from sam3_jax.sharding import make_mesh

    rng = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = rng.standard_normal(leaf.shape, np.float32)
        scale = 0.1
        if path[-1].key == "kernel":
            scale = np.float32(0.5 * leaf.shape[-1] / leaf.size) ** np.float32(0.5)
        return (1 if path[-1].key == "scale" else 0) + scale * values

    model = config.NAMED[size]()
    params = jax.tree_util.tree_map_with_path(draw, init_shapes(model))
    mesh = make_mesh() if jax.device_count() > 1 else None
    return Engine(params, model, dtype=dtype, mesh=mesh)


def model_alone(engine: Any, batch: int, batches: int) -> float:
    """Pictures a second of the forward pass, results read back."""
    import jax

    from sam3_jax.inference.prompts import Prompt

    side = engine.config.image_size
    inputs = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)
    prompts, sizes = [[Prompt("cat")]] * batch, [(side, side)] * batch

    def run() -> Any:
        (found,) = engine.submit(inputs, prompts, sizes, batch)
        return found.queries, found.masks

    jax.block_until_ready(run())
    start = time.perf_counter()
    waiting = [run() for _ in range(batches)]
    jax.block_until_ready(waiting)
    return batch * batches / (time.perf_counter() - start)


def threshold_of(engine: Any, path: Path) -> float:
    """A threshold above which a picture has about ten instances."""
    from sam3_jax.inference.image import ImagePredictor

    predictor = ImagePredictor.from_engine(engine)
    predictor.set_image(path)
    raw = predictor.predict_raw("cat")
    scores = 1 / (1 + np.exp(-raw.pred_logits)) / (1 + np.exp(-raw.presence_logits))
    return float(np.sort(scores)[-min(INSTANCES, len(scores))])


def pipeline(engine: Any, paths: list[Path], output: Path, batch: int, workers: int) -> dict:
    """Pictures a second of the whole, after one batch to warm up."""
    from sam3_jax.inference import bulk
    from sam3_jax.inference.jobs import make_job
    from sam3_jax.inference.work import Settings

    settings = Settings(threshold=threshold_of(engine, paths[0]), batch_size=batch, workers=workers)
    jobs = [make_job(path, phrases=["cat"]) for path in paths]

    def run(jobs: list, name: str) -> tuple[float, int]:
        (output / name).mkdir(parents=True)
        start = time.perf_counter()
        summary = bulk.run(engine, jobs, output / name, settings, info={})
        return time.perf_counter() - start, summary.instances

    run(jobs[:batch], "warm")
    seconds, instances = run(jobs, "timed")
    found = {"images_per_s": len(jobs) / seconds, "instances": instances}

    # The model's part takes no time any more: any batch has the outputs of the first one.
    submit = functools.cache(lambda: first_batch(engine, paths, batch))
    submit()
    engine.submit = lambda *_: submit()
    cpu = time.process_time()
    try:
        seconds, _ = run(jobs, "around")
    finally:
        del engine.submit
    cpu = time.process_time() - cpu  # of all threads, whatever else the machine does
    around = {"pipeline_images_per_s": len(jobs) / seconds}
    return {**found, **around, "pipeline_cpu_ms": 1e3 * cpu / len(jobs)}


def first_batch(engine: Any, paths: list[Path], batch: int) -> list:
    """The model's outputs for the first pictures."""
    import jax

    from sam3_jax.data.images import load_image, resize_image
    from sam3_jax.inference.prompts import Prompt

    images = [load_image(path) for path in paths[:batch]]
    inputs = np.stack([resize_image(image, (engine.config.image_size,) * 2) for image in images])
    sizes = [image.shape[:2] for image in images]
    prompts = [[Prompt("cat")]] * len(images)
    return jax.block_until_ready(engine.submit(inputs, prompts, sizes, batch))


def memory(name: str) -> int:
    """Bytes of this process: VmRSS, resident now, or VmHWM, its peak."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def discs(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, boxes and mask logits of round objects, as the released model gives them."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:288, :288].astype(np.float32)
    centre, radius = rng.uniform(20, 268, (count, 2, 1, 1)), rng.uniform(4, 40, (count, 1, 1))
    logits = (radius - np.hypot(x - centre[:, 0], y - centre[:, 1])).astype(np.float32)
    boxes = np.full((count, 4), 0.5, np.float32)
    return np.linspace(0.9, 0.5, count, dtype=np.float32), boxes, logits


def postprocessing(folder: Path) -> dict:
    """200 masks of 288 x 288 on a 4K photograph, to annotations and an overlay."""
    import PIL.Image
    import skimage.data

    from sam3_jax.inference import writers
    from sam3_jax.inference.placed import annotation, place

    found, size = discs(200), (2160, 3840)
    image = np.asarray(PIL.Image.fromarray(skimage.data.coffee()).resize(size[::-1]))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before, start = memory("VmRSS"), time.perf_counter()
    made = [annotation("cat", one, size) for one in place(*found, size)]
    middle = time.perf_counter()
    writers.write_overlay(folder, "x", image, made)
    end = time.perf_counter()
    return {
        "masks": 200,
        "annotations_s": middle - start,
        "overlay_s": end - middle,
        "memory_gb": (memory("VmHWM") - before) / 1e9,
    }


def stages(paths: list[Path], folder: Path) -> dict:
    """Milliseconds of one core that each stage takes a picture."""
    from sam3_jax.data.images import load_image, resize_image
    from sam3_jax.inference import rle, visualize
    from sam3_jax.inference.placed import annotation, place
    from sam3_jax.inference.png import strips_of, write_png

    total: dict[str, float] = collections.defaultdict(float)

    def timed(stage: str, function: Callable, *args: Any) -> Any:
        start = time.thread_time()
        result = function(*args)
        total[stage] += 1e3 * (time.thread_time() - start) / len(paths)
        return result

    scores, boxes, logits = discs(INSTANCES)
    for path in paths:
        image = timed("decode", load_image, path)
        size = image.shape[:2]
        timed("resize", resize_image, image, (1008, 1008))
        placed = timed("masks", lambda size=size: list(place(scores, boxes, logits, size)))
        made = timed("rle", lambda p=placed, s=size: [annotation("cat", one, s) for one in p])
        crops = timed("unpack", lambda m=made: [rle.decode_crop(a["segmentation"]) for a in m])
        extents = [visualize.Rect(x, y, x + c.shape[1], y + c.shape[0]) for c, y, x in crops]
        areas = np.asarray([a["area"] for a in made])
        texts = [f"cat {score:.2f}" for score in scores]
        masks = [crop for crop, _, _ in crops]
        get = masks.__getitem__
        drawn = timed("draw", visualize.draw, image, get, extents, areas, scores, texts)
        timed("png", write_png, folder / "x.png", size, strips_of(drawn))
        timed("record", json.dumps, made)
    return {**total, "sum_ms": sum(total.values())}


def table(rows: list[dict]) -> str:
    """Markdown."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", action="append", choices=("tiny", "sam3"), help="default tiny")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--batch", action="append", type=int, help="default 8 (tiny), 1 (sam3)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()

    import jax

    result: dict[str, Any] = {"schema_version": 1, "device": jax.devices()[0].device_kind}
    result |= {"cores": os.cpu_count(), "rows": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        result["postprocessing_4k"] = postprocessing(folder)
        print(table([result["postprocessing_4k"]]), flush=True)
        paths = write_pictures(folder / "pictures", args.pictures)
        stages(paths[: len(SIDES)], folder)  # what is computed once
        result["cpu_ms_a_picture"] = stages(paths, folder)
        print(table([result["cpu_ms_a_picture"]]), flush=True)
        for size in args.size or ["tiny"]:
            engine = make_engine(size, args.dtype)
            default = 8 if size == "tiny" or jax.default_backend() != "cpu" else 1
            for batch in args.batch or [default]:
                alone = model_alone(engine, batch, max(args.pictures // batch, 1))
                output = folder / f"{size}-{batch}"
                whole = pipeline(engine, paths, output, batch, args.workers)
                row = {"size": size, "dtype": engine.dtype.name, "batch": batch}
                row |= {"model_images_per_s": alone, **whole}
                row["efficiency"] = row["images_per_s"] / alone
                result["rows"].append(row)
                print(table(result["rows"]), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

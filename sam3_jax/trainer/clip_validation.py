"""J&F of held-out sequences during a run, by the code of ``evaluate.py``.

Objects are given by their masks in the first annotated frame. Process 0 follows them, with the
whole model on one of its devices; the figures go to all processes.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import jax

from sam3_jax.config import ModelConfig
from sam3_jax.data.records import AnnotationError
from sam3_jax.evaluation.video.davis import score_objects, summary
from sam3_jax.evaluation.video.davis_folders import load_sequences, read_frames, sequences_folder
from sam3_jax.evaluation.video.predict_masks import frames_folder, predict_masks
from sam3_jax.inference.engine import Engine
from sam3_jax.trainer.config import SplitConfig, ValidationConfig
from sam3_jax.trainer.validation import FOLDER, Validation, exchange, gather_params
from sam3_jax.video.predictor import VideoPredictor

MASKS, METRICS = "masks", "metrics.json"  # in the folder of a validation


class ClipValidator:
    """The held-out sequences, and one set of compiled programs for the whole run."""

    def __init__(
        self,
        split: SplitConfig,
        config: ValidationConfig,
        model: ModelConfig,
        *,
        dtype: str,
        folder: Path,
    ):
        """Finds the sequences.

        Args:
          split: ``annotations``: a folder in DAVIS' layout, one of PNGs for each sequence;
            ``images``: the folder of the frames, JPEGImages beside the annotations by default.
          config: ``images``: the first so many sequences; 0: all.
          dtype: of computation.
          folder: the run's; each validation is written below ``folder/validation``.

        Raises:
          AnnotationError: no such folders.
          ValueError: on an unknown ``dtype``.
        """
        gt = Path(split.annotations)
        annotations = sequences_folder(gt) if gt.is_dir() else None
        if annotations is None:
            raise AnnotationError(
                f"{gt}: is no folder with a folder of PNG files for each sequence, as DAVIS has"
            )
        self._annotations = annotations
        self._frames = Path(split.images) if split.images else frames_folder(gt, annotations)
        every = {f.name: tuple(sorted(f.glob("*.png"))) for f in sorted(annotations.iterdir())}
        names = [name for name, files in every.items() if files]
        self._sequences = {name: every[name] for name in names[: config.images or None]}
        self._folder, self._max_bad = folder / FOLDER, split.max_bad
        self._engine = Engine({}, model, dtype=dtype)
        self._predictor: VideoPredictor | None = None

    def run(self, params: dict, step: int) -> Validation:
        """Measures parameters, which may be spread over a mesh; all processes must take part.

        On the devices nothing stays behind but the programs.
        """
        used = jax.sharding.get_abstract_mesh().axis_names
        answer = b""
        with jax.set_mesh(None) if used else contextlib.nullcontext():
            try:
                self._engine.replace_params(gather_params(params, self._engine.dtype))
                if jax.process_index() == 0:
                    answer = json.dumps(self._measure(step)).encode()
            finally:
                self._engine.replace_params({})
        return Validation(json.loads(exchange(answer)[0]), {}, [])

    def _measure(self, step: int) -> dict[str, float]:
        if self._predictor is None:
            self._predictor = VideoPredictor.from_engine(self._engine)
        target = self._folder / f"step_{step:08d}"
        # Of a step that is repeated after a resume there is one already, of another run's weights.
        shutil.rmtree(target, ignore_errors=True)
        masks = target / MASKS
        masks.mkdir(parents=True)
        info = {"step": step, "dtype": self._engine.dtype.name}
        predict_masks(self._predictor, self._sequences, self._frames, masks, info=info)
        data, problems, _ = load_sequences(self._annotations, masks, list(self._sequences))
        scores = []
        for sequence in data:
            scores += score_objects(
                sequence.name, read_frames(sequence, problems), sequence.objects
            )
        problems.check(str(masks), sum(len(s.frames) for s in data), self._max_bad)
        figures = summary(scores)
        objects = {f"{s.sequence}/{s.object_id}": [s.j.mean(), s.f.mean()] for s in scores}
        text = json.dumps({**info, "figures": figures, "objects": objects}, indent=1)
        (target / METRICS).write_text(text + "\n", encoding="utf-8")
        return figures

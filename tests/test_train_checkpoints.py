"""States of a run: exact on any devices, complete or not there, whatever happens meanwhile."""

from __future__ import annotations

import json
import resource
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from sam3_jax.checkpoint import CheckpointError
from sam3_jax.sharding import make_mesh, on_one_device, param_shardings
from sam3_jax.trainer.checkpoints import FIGURES, RunCheckpoints
from sam3_jax.trainer.config import CheckpointConfig
from sam3_jax.trainer.store import UNFINISHED
from sam3_jax.training.state import TrainState

ROOT = Path(__file__).resolve().parents[1]
POSITION = {"batch_size": 4, "data": "train-01ab", "data_seed": 7}
SHAPES = {
    "vision": {"trunk": {"block_0": {"attn": {"q": {"kernel": (256, 4, 64), "bias": (4, 64)}}}}},
    "scoring": {"prompt_mlp": {"fc1": {"kernel": (96, 32)}}},
}

# Where writing fails, Orbax's other threads meet an event loop that is closed already.
orbax_fails = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def make_state(
    seed: int, mesh: Mesh | None = None, *, lora: bool = False, ema: bool = False
) -> TrainState:
    """A small state with the paths of a real one, random to the last bit."""
    rng = np.random.default_rng(seed)

    def draw(shapes: dict | tuple) -> dict | np.ndarray:
        if isinstance(shapes, dict):
            return {name: draw(inner) for name, inner in shapes.items()}
        return rng.standard_normal(shapes, np.float32)

    params = draw(SHAPES)
    added = draw({"vision": {"q": {"a": (256, 2), "b": (2, 256)}}}) if lora else None
    train = added or params
    step, skipped, in_a_row = (np.array(n, np.int32) for n in (seed, 3, seed % 2))
    adam = optax.ScaleByAdamState(step, draw(SHAPES), jax.tree.map(np.square, train))
    opt_state = (optax.EmptyState(), (adam, optax.MaskedNode()))
    average = jax.tree.map(np.negative, train) if ema else None
    state = TrainState(step, params, added, opt_state, average, skipped, in_a_row)
    return jax.device_put(state, places(state, mesh))


def places(state: TrainState, mesh: Mesh | None) -> TrainState:
    return param_shardings(state, mesh) if mesh else TrainState(**on_one_device(state._asdict()))


def shapes_of(state: TrainState, mesh: Mesh | None = None) -> TrainState:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state,
        places(state, mesh),
    )


def assert_same(actual: TrainState, expected: TrainState) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def open_run(tmp_path: Path) -> Iterator[Callable[..., RunCheckpoints]]:
    """A function that opens the same folder, as one start of the program after another does."""
    opened = []

    def open_(keep: int = 2, best: str = "segm/cgF1") -> RunCheckpoints:
        config = CheckpointConfig(keep=keep, best=best)
        opened.append(RunCheckpoints(tmp_path / "run" / "states", config))
        return opened[-1]

    yield open_
    for run in opened:
        run.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


MESHES = {
    "1 device": lambda: None,
    "2 devices": lambda: make_mesh(2, devices=jax.devices()[:2]),
    "fsdp over 2": lambda: make_mesh(1, fsdp=2, devices=jax.devices()[:2]),
    "2 x fsdp over 2": lambda: make_mesh(2, fsdp=2, devices=jax.devices()[:4]),
    "fsdp over 2 x tensor over 2": lambda: make_mesh(1, 2, fsdp=2, devices=jax.devices()[4:]),
}


@pytest.mark.parametrize(
    ("mesh", "lora", "ema"),
    [("2 x fsdp over 2", False, True), ("2 devices", True, False), ("1 device", True, True)],
)
def test_what_is_saved_is_restored_on_other_devices(open_run, mesh: str, lora: bool, ema: bool):
    state = make_state(5, MESHES[mesh](), lora=lora, ema=ema)
    open_run().save(5, state, POSITION, wait=True)
    run = open_run()
    assert run.latest() == 5
    for make in MESHES.values():
        like = shapes_of(state, make())
        restored, position = run.restore(like)
        assert_same(restored, state)
        assert position == POSITION
        for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
            assert leaf.sharding == wanted.sharding
    assert_same(run.restore(state)[0], state)  # arrays say where to as well


def test_the_next_step_may_take_the_buffers_over(open_run):
    """Each state is on disk as it was, though the next ones were computed in its place."""
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = jax.tree.map(jnp.zeros_like, make_state(0, ema=True))
    run = open_run(keep=4)
    for number in range(1, 5):
        state = step(state)
        run.save(number, state, POSITION)
        state = step(step(state))
        assert run.latest() in (None, number - 1, number)
    run.wait()
    for number in range(1, 5):
        restored, _ = run.restore(shapes_of(state), number)
        for leaf in jax.tree.leaves(restored):
            np.testing.assert_array_equal(leaf, 3 * number - 2)


def test_the_latest_and_the_best_are_kept(open_run, tmp_path: Path):
    folder = tmp_path / "run" / "states"
    states = {step: make_state(step) for step in range(10, 70, 10)}
    run = open_run()
    assert run.latest() is None
    assert run.best() is None
    figures = {10: 0.2, 20: 0.6, 30: float("nan"), 40: 0.5, 60: 0.6}
    better = {}
    for step, state in states.items():
        if step in figures and step != 20:
            better[step] = run.record_best(step, {"segm/cgF1": figures[step], "loss": 9.0})
        run.save(step, state, {"step": step})
        if step == 20:  # validated after it was saved
            better[step] = run.record_best(step, {"segm/cgF1": figures[step]})
        if step == 50:
            run.wait()
            assert names(folder) == ["20", "40", "50", FIGURES]
            assert (run.latest(), run.best()) == (50, 20)
    run.wait()
    assert better == {10: True, 20: True, 30: False, 40: False, 60: False}
    assert names(folder) == ["50", "60", FIGURES]  # of equals the later
    run = open_run()
    assert (run.latest(), run.best()) == (60, 60)
    restored, position = run.restore(shapes_of(states[10]), 60)
    assert_same(restored, states[60])
    assert position == {"step": 60}
    with pytest.raises(CheckpointError, match=r"no complete state of step 20; there are: 50, 60"):
        run.restore(shapes_of(states[10]), 20)
    # Validated, and killed before its state was there: not the best of anything.
    assert run.record_best(70, {"segm/cgF1": 1.0})
    run = open_run()
    assert run.best() == 60
    run.save(80, states[10], POSITION, metrics={"segm/cgF1": 0.7}, wait=True)
    assert run.best() == 80


def test_figures_without_masks(open_run):
    run = open_run()
    run.save(1, make_state(1), POSITION, metrics={"bbox/cgF1": 0.5}, wait=True)
    assert run.best() == 1
    with pytest.raises(ValueError, match=r"checkpoint.best='segm/cgF1' is not one of bbox/AP, x"):
        run.record_best(2, {"x": 1.0, "bbox/AP": 0.5})


def test_leftovers(open_run, tmp_path: Path):
    """Parts of saves and of removals that were cut short are no states, and they go away."""
    folder, state = tmp_path / "run" / "states", make_state(1)
    run = open_run(keep=3)
    for step in (10, 20, 30):
        run.save(step, state, POSITION, wait=True)
    shutil.rmtree(folder / "10" / "state")
    shutil.copytree(folder / "30", folder / f"40{UNFINISHED}")
    (folder / "notes").mkdir()
    run = open_run(keep=2)
    assert run.latest() == 30
    with pytest.raises(CheckpointError, match="no complete state of step 10; there are: 20, 30"):
        run.restore(shapes_of(state), 10)
    run.save(50, state, POSITION, wait=True)
    assert names(folder) == ["30", "50", "notes"]


def test_states_are_never_replaced(open_run):
    run, state = open_run(), make_state(1)
    run.save(10, state, POSITION, wait=True)
    for step in (9, 10):
        with pytest.raises(CheckpointError, match=rf"state of step 10 already, so step {step} .*"):
            run.save(step, make_state(2), POSITION)
    assert_same(run.restore(shapes_of(state))[0], state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s._replace(ema=None),
            r"10: is of another model or optimizer: ema/scoring/prompt_mlp/fc1/kernel is "
            r"\(96, 32\) float32 there and missing now; .*ema.* choose another output",
        ),
        (
            lambda s: s._replace(lora={"fc1": {"a": s.step}}),
            r"lora/fc1/a is missing there and \(\) int32 now\. Set",
        ),
        (
            lambda s: s._replace(params=jax.tree.map(lambda x: x[:2], s.params)),
            r"params/scoring/prompt_mlp/fc1/kernel is \(96, 32\) float32 there and \(2, 32\)",
        ),
        (
            lambda s: jax.tree.map(lambda x: x.astype(jnp.bfloat16), s),
            r"step is \(\) int32 there and \(\) bfloat16 now; .*; and 13 more\. Set",
        ),
    ],
)
def test_a_state_of_another_model(open_run, tmp_path: Path, change: Callable, message: str):
    run, state = open_run(), make_state(1, ema=True)
    run.save(10, state, POSITION, wait=True)
    with pytest.raises(CheckpointError, match=message) as caught:
        run.restore(shapes_of(change(state)))
    assert str(tmp_path / "run" / "states" / "10") in str(caught.value)


@orbax_fails
@pytest.mark.parametrize(
    "file", ["state/_METADATA", "state/manifest.ocdbt", "_CHECKPOINT_METADATA"]
)
def test_a_damaged_state(open_run, tmp_path: Path, file: str):
    run, state = open_run(), make_state(1)
    run.save(10, state, POSITION, wait=True)
    run.save(20, state, POSITION, wait=True)
    (tmp_path / "run" / "states" / "20" / file).unlink()
    with pytest.raises(CheckpointError, match=r"20: damaged .*remove.*goes on from step 10"):
        run.restore(shapes_of(state))
    shutil.rmtree(tmp_path / "run" / "states" / "20")
    assert_same(open_run().restore(shapes_of(state))[0], state)


def test_nothing_there(open_run, tmp_path: Path):
    with pytest.raises(CheckpointError, match="states: has no state; there are: none"):
        open_run().restore(shapes_of(make_state(1)))
    with pytest.raises(ValueError, match=r"checkpoint.keep=0: keep at least one"):
        open_run(keep=0)
    run = open_run()
    run.save(1, make_state(1), POSITION, wait=True)
    with pytest.raises(ValueError, match=r"^step: give shapes with shardings, or arrays"):
        run.restore(jax.eval_shape(lambda state: state, make_state(1)))
    (tmp_path / "run" / "states" / FIGURES).write_text("{")
    with pytest.raises(CheckpointError, match=r"figures.json: cannot be read .*remove it"):
        open_run()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/states: cannot be used .*another output"):
        RunCheckpoints(tmp_path / "file" / "states", CheckpointConfig())


@pytest.fixture
def limit_files() -> Iterator[Callable[[int], None]]:
    """Writing past so many bytes fails, as on a disk that fills up meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))

    yield limit
    limit(None)


@orbax_fails
@pytest.mark.parametrize("size", [2**16, 64])  # the arrays do not fit, or not even the position
def test_a_disk_that_fills_up(open_run, limit_files, tmp_path: Path, caplog, size: int):
    run, state = open_run(), make_state(1)
    run.save(10, state, POSITION)
    run.save(20, state, POSITION, wait=True)
    limit_files(size)
    newer = make_state(2)
    with pytest.raises(CheckpointError, match=r"30: saving failed.* step 20 is intact.*free some"):
        run.save(30, newer, POSITION, wait=True)
    assert run.latest() == 20
    # Without waiting it is the next save that hears of it.
    with pytest.raises(CheckpointError, match="30: saving failed"):  # noqa: PT012
        run.save(30, newer, POSITION)
        run.save(40, newer, POSITION)
    limit_files(None)
    assert names(tmp_path / "run" / "states") == ["10", "20"]
    assert_same(newer, make_state(2))
    assert_same(run.restore(shapes_of(state), 10)[0], state)
    late = tmp_path / "run" / "states" / "30.orbax-checkpoint-tmp"  # by one of Orbax's threads
    late.mkdir()
    run.save(40, newer, POSITION, wait=True)  # the training went on
    assert_same(run.restore(shapes_of(state))[0], newer)
    assert names(tmp_path / "run" / "states") == ["20", "40"]
    assert [r.message for r in caplog.records if r.exc_info] == []  # no pages of traces


@orbax_fails
def test_a_folder_that_goes_away(open_run, tmp_path: Path):
    run, state, folder = open_run(), make_state(1), tmp_path / "run" / "states"
    run.save(10, state, POSITION, wait=True)
    folder.rename(tmp_path / "elsewhere")
    folder.write_text("")
    with pytest.raises(CheckpointError, match=r"20: saving failed.*there is none before it"):
        run.save(20, state, POSITION, wait=True)
    with pytest.raises(CheckpointError, match=r"figures.json: cannot be written"):
        run.record_best(20, {"segm/cgF1": 0.5})
    folder.unlink()
    (tmp_path / "elsewhere").rename(folder)
    run.save(30, state, POSITION, wait=True)
    assert_same(run.restore(shapes_of(state))[0], state)


def test_a_disk_that_is_too_small(open_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = open_run()
    usage = namedtuple("usage", "total used free")(10**6, 10**6 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"7: needs 0\.00 GB and 0\.00 GB are free.*keep"):
        run.save(7, make_state(1), POSITION)
    assert names(tmp_path / "run" / "states") == []


# A run that saves without pause: all elements of the state of step n, and its position, are n.
ENDLESS = """
import sys
from pathlib import Path
import jax, numpy as np
from sam3_jax.trainer.checkpoints import RunCheckpoints
from sam3_jax.trainer.config import CheckpointConfig
from test_train_checkpoints import filled, shapes_of

checkpoints = RunCheckpoints(Path(sys.argv[1]), CheckpointConfig(keep=2))
step = checkpoints.latest() or 0
if step:
    checkpoints.restore(shapes_of(filled(0)))
while True:
    step += 1
    checkpoints.record_best(step, {"segm/cgF1": step * 7 % 10})
    checkpoints.save(step, filled(step), {"step": step})
    print("saving", flush=True)
"""


def filled(step: int) -> TrainState:
    state = jax.tree.map(lambda leaf: np.full_like(leaf, step), make_state(0, lora=True, ema=True))
    return jax.device_put(state)


@pytest.mark.slow
def test_killed_in_the_middle_of_saves(open_run, tmp_path: Path):
    """The newest complete state and the best one load, and are those of their steps."""
    folder, rng = tmp_path / "run" / "states", np.random.default_rng(0)
    path = [str(ROOT), str(ROOT / "tests"), *sys.path]
    code = f"import sys; sys.path[:0] = {path!r}\n{ENDLESS}"
    steps, cut_short = [0], 0
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE)
        for _ in range(rng.integers(1, 5)):
            assert process.stdout.readline() == b"saving\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, 0.05))  # a save takes about as long
        process.kill()
        process.communicate()
        cut_short += any(UNFINISHED in name for name in names(folder))
        run = open_run()
        for step in {run.latest(), run.best()} - {None}:
            restored, position = run.restore(shapes_of(filled(0)), step)
            assert_same(restored, filled(step))
            assert position == {"step": step}
        steps.append(run.latest() or 0)
        run.close()
    assert steps == sorted(steps)
    assert steps[-1] > 5, steps
    assert cut_short > 2, "the kills came between the saves"


# One of two processes with two devices each; all four share the state.
SHARE = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
from pathlib import Path
import jax
number, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, number)
from sam3_jax.sharding import make_mesh
from sam3_jax.trainer.checkpoints import RunCheckpoints
from sam3_jax.trainer.config import CheckpointConfig
from test_train_checkpoints import make_state, shapes_of
import numpy as np

mesh = make_mesh(2, fsdp=2)
checkpoints = RunCheckpoints(folder, CheckpointConfig(keep=1))
assert checkpoints.latest() is None
for step in (1, 2, 3):
    checkpoints.record_best(step, {"segm/cgF1": -step})
    checkpoints.save(step, make_state(step, mesh, ema=True), {"step": step})
checkpoints.wait()
assert (checkpoints.latest(), checkpoints.best()) == (3, 1)
state, position = checkpoints.restore(shapes_of(make_state(0, mesh, ema=True), mesh))
assert position == {"step": 3}
whole = make_state(3, ema=True) if number == 0 else None
for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(whole)):
    for shard in one.addressable_shards:
        np.testing.assert_array_equal(shard.data, np.asarray(other)[shard.index])
checkpoints.close()
print("done")
"""


@pytest.mark.slow
def test_two_processes(open_run, tmp_path: Path):
    """They save one state together, and one process reads it."""
    folder = tmp_path / "run" / "states"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    path = [str(ROOT), str(ROOT / "tests"), *sys.path]
    code = f"import sys; sys.path[:0] = {path!r}\n{SHARE}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(number), str(port), folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        for process in processes:
            out, err = process.communicate(timeout=120)
            assert out.endswith("done\n"), err[-3000:]  # after a line or two of Gloo's
    finally:
        for process in processes:
            process.kill()
    run = open_run(keep=1)
    assert names(folder) == ["1", "3", FIGURES]
    assert json.loads((folder / FIGURES).read_text()) == {"1": -1.0, "2": -2.0, "3": -3.0}
    for step in (1, 3):
        expected = make_state(step, ema=True)
        assert_same(run.restore(shapes_of(expected), step)[0], expected)

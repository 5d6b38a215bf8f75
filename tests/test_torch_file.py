"""The reader of torch files: equal to torch's own, and nothing in a file is ever run."""

from __future__ import annotations

import collections
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sam3_jax.convert.errors import ConversionError
from sam3_jax.convert.source import open_source
from sam3_jax.convert.torch_file import read_torch


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_read_like_torch(path: Path, expected: dict[str, torch.Tensor]) -> None:
    actual = read_torch(path)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].shape == tuple(tensor.shape), name
        assert str(actual[name].dtype) == str(tensor.dtype).removeprefix("torch."), name
        assert np.ascontiguousarray(actual[name]).tobytes() == as_bytes(tensor), name


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """Every dtype that weights have, and tensors that are views in every way."""
    torch.manual_seed(0)
    base = torch.randn(6, 4, 5)
    floats = ("float32", "float16", "bfloat16", "float64", "complex64")
    dtypes = {name: torch.randn(3, 4).to(getattr(torch, name)) for name in floats}
    dtypes |= {name: torch.arange(7).to(getattr(torch, name)) for name in ("int64", "int32")}
    dtypes |= {name: torch.arange(7).to(getattr(torch, name)) for name in ("uint8", "int8", "bool")}
    views = {
        "transposed": base.permute(2, 0, 1),
        "part": base[2:4, 1:, ::2],
        "same storage": base[0],
        "expanded": torch.randn(1, 3).expand(4, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    }
    return dtypes | views


@pytest.mark.parametrize("wrapped", [False, True])
def test_every_dtype_and_view(state: dict[str, torch.Tensor], wrapped: bool, tmp_path: Path):
    content = {"model": state, "epoch": 3, "args": ["a", None, True, 1.5]} if wrapped else state
    torch.save(content, tmp_path / "weights.pt")
    assert_read_like_torch(tmp_path / "weights.pt", state)


def test_the_state_dict_of_a_module(tmp_path: Path):
    """An ordered dictionary with attributes, as modules give it."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm2d(4))
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    assert_read_like_torch(tmp_path / "weights.pt", module.state_dict())


def test_arrays_are_views_of_the_file(tmp_path: Path):
    torch.save({"a": torch.arange(6.0)}, tmp_path / "weights.pt")
    array = read_torch(tmp_path / "weights.pt")["a"]
    assert not array.flags.writeable
    assert not array.flags.owndata


class Call:
    """Pickles as a call of a function, which is how hostile pickles run code."""

    def __init__(self, function: Callable, *args: Any):
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.call


def write_archive(path: Path, content: Any, **entries: bytes) -> None:
    """A torch file with any pickle in it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, 2))
        for name, data in entries.items():
            archive.writestr(f"archive/{name.replace('_', '/')}", data)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda mark: Call(os.system, f"touch {mark}"), "posix.system"),
        (lambda mark: Call(eval, f"open({str(mark)!r}, 'w')"), "builtin.*eval"),
        (lambda mark: Call(getattr, "text", "upper"), "builtin.*getattr"),
        (lambda mark: {"weight": Call(io.open, str(mark), "w")}, "io.open"),
        (lambda mark: {"model": {"w": Call(torch.load, str(mark))}}, r"torch\.serialization\.load"),
        (lambda mark: np.float64(1), "numpy.*scalar"),
        (lambda mark: collections.Counter("a"), r"collections\.Counter"),
        (lambda mark: torch.nn.Linear(1, 1), r"torch\.nn\.modules\.linear\.Linear"),
    ],
)
def test_hostile_pickles_are_refused_by_name(make: Callable, name: str, tmp_path: Path):
    mark = tmp_path / "mark"
    write_archive(tmp_path / "evil.pt", make(mark))
    with pytest.raises(ConversionError, match=rf"evil\.pt: refused, .* asks for .*{name}.*If you"):
        read_torch(tmp_path / "evil.pt")
    assert not mark.exists()


def test_what_the_allowed_names_can_be_made_to_do(tmp_path: Path):
    """A pickle may call the allowed functions with anything: it gets an error and no memory."""

    class Rebuild:
        def __init__(self, *args: Any):
            self.args = args

        def __reduce__(self) -> tuple[Callable, tuple]:
            return torch._utils._rebuild_tensor_v2, self.args

    for args in [(None,) * 6, ("storage", 0, (2**60,), (1,), False, None), ((), 0)]:
        write_archive(tmp_path / "odd.pt", {"a": Rebuild(*args)})
        with pytest.raises(ConversionError, match="damaged, download it again"):
            read_torch(tmp_path / "odd.pt")


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(0, (5,), (1,)), (3, (2,), (1,)), (0, (2, 3), (3, 1)), (0, (-1,), (1,)), (0, (2,), (-1,))],
)
def test_tensors_stay_inside_their_storage(
    offset: int, shape: tuple, strides: tuple, tmp_path: Path
):
    """Views that reach beyond the four numbers they belong to."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            is_storage = value == "storage of 4"
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if is_storage else None

    class Rebuild:
        def __reduce__(self) -> tuple[Callable, tuple]:
            args = ("storage of 4", offset, shape, strides, False, collections.OrderedDict())
            return torch._utils._rebuild_tensor_v2, args

    stream = io.BytesIO()
    Pickler(stream, 2).dump({"a": Rebuild()})
    with zipfile.ZipFile(tmp_path / "odd.pt", "w") as archive:
        archive.writestr("archive/data.pkl", stream.getvalue())
        archive.writestr("archive/data/0", np.arange(4, dtype=np.float32).tobytes())
    with pytest.raises(ConversionError, match=r"odd\.pt: damaged, .*a tensor of shape"):
        read_torch(tmp_path / "odd.pt")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files(share: float, state: dict[str, torch.Tensor], tmp_path: Path):
    path = tmp_path / "sam3.pt"
    torch.save(state, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ConversionError, match=r"sam3\.pt: .*(download it again|not a file of)"):
        open_source(str(path))


def test_damaged_pickles(state: dict[str, torch.Tensor], tmp_path: Path):
    """Any byte of the pickle may be wrong: an error of ours, or other numbers, never a crash."""
    torch.save({"a": torch.arange(3.0), "b": torch.ones(2, 2)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    (name,) = [name for name in entries if name.endswith("data.pkl")]
    refused = 0
    for place in range(0, len(entries[name]), 3):
        data = bytearray(entries[name])
        data[place] ^= 0xFF
        with zipfile.ZipFile(tmp_path / "bad.pt", "w") as archive:
            for key, value in (entries | {name: bytes(data)}).items():
                archive.writestr(key, value)
        try:
            read_torch(tmp_path / "bad.pt")
        except ConversionError as error:
            assert "bad.pt: " in str(error)  # noqa: PT017
            refused += 1
    assert refused > 50


def test_missing_and_short_storages(tmp_path: Path):
    torch.save({"a": torch.arange(3.0)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    (key,) = [name for name in entries if name.endswith("data/0")]
    for change, message in (({}, "storage 0 is missing"), ({key: b"1234"}, "has 4 bytes for 3")):
        with zipfile.ZipFile(tmp_path / "bad.pt", "w") as archive:
            for name, data in ({k: v for k, v in entries.items() if k != key} | change).items():
                archive.writestr(name, data)
        with pytest.raises(ConversionError, match=f"damaged, download it again.*{message}"):
            read_torch(tmp_path / "bad.pt")


def _deflate(path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def _big_endian(path: Path) -> None:
    write_archive(path, {"a": 1}, byteorder=b"big")


def _zip_of_text(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def _script(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: torch.save({"a": 1}, p, _use_new_zipfile_serialization=False), "before 1.6"),
        (lambda p: p.write_bytes(pickle.dumps({"a": 1}, 4)), "bare pickle.*save it again"),
        (_deflate, "compressed again"),
        (_big_endian, "big-endian"),
        (_zip_of_text, "not one that torch.save writes"),
        (_script, "TorchScript"),
        (lambda p: torch.save([torch.zeros(1)], p), r"no dictionary of tensors \(list\)"),
        (
            lambda p: torch.save({"a": torch.zeros(1), "b": 3}, p),
            r"1 entries are no tensors \('b'\)",
        ),
        (lambda p: torch.save({}, p), "no dictionary of tensors"),
        (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        (lambda p: p.write_text("<!DOCTYPE html>\n<html>"), "web page"),
        (lambda p: p.write_bytes(b"\x93NUMPY\x01\x00"), r"starts with b'\\x93NUMPY"),
        (lambda p: p.write_bytes(b""), "not a file of torch.save or safetensors"),
    ],
)
def test_other_containers(write: Callable[[Path], object], message: str, tmp_path: Path):
    path = tmp_path / "sam3.pt"
    write(path)
    with pytest.raises(ConversionError, match=rf"sam3\.pt: .*{message}"):
        open_source(str(path))

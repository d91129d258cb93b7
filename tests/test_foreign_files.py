"""Readers say what is wrong with a file: missing, damaged, or something else under its name."""

from __future__ import annotations

import io
import os
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_tensors
from torch import nn

from vfx.data.arrays import read_inputs, read_labelled
from vfx.emit.files import export, load
from vfx.errors import CheckpointError, DataError, VfxError

WEIGHTS = [".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".pt2", ".onnx"]
ARRAYS = [".npy", ".npz", ".pt", ".safetensors"]
READERS = [(load, suffix, CheckpointError) for suffix in WEIGHTS]
READERS += [(read_inputs, suffix, (DataError, CheckpointError)) for suffix in ARRAYS]
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def _tar() -> bytes:
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.bin"))
    return buffer.getvalue()


@pytest.mark.parametrize(("read", "suffix", "kind"), READERS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "is a git-lfs pointer, not the file it points to; fetch that by: git lfs pull"),
        (PAGE, "is an HTML page"),
        ("Epoche 3, Güte 0.9 ".encode() * 100, "is a text that begins 'Epoche 3, Güte 0.9"),
        (("x" * 1023 + "ü").encode(), "is a text that begins 'xxx"),
        (b"", "is empty"),
        (b"\x1f\x8b\x08\0\0\0", "is gzip-compressed; unpack it first"),
        (_tar(), "is a tar archive; unpack it first"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
    ],
    ids=["pointer", "page", "text", "cut text", "empty", "gzip", "tar", "hdf5"],
)
def test_what_only_has_the_name_is_named(
    tmp_path: Path, read: Callable[..., Any], suffix: str, kind: Any, content: bytes, message: str
) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(kind, match=f"model{suffix} {message}"):
        read(path)


@pytest.mark.parametrize(("read", "suffix", "kind"), READERS)
def test_what_is_no_file_is_named_and_not_opened(
    tmp_path: Path, read: Callable[..., Any], suffix: str, kind: Any
) -> None:
    (tmp_path / f"folder{suffix}").mkdir()
    os.mkfifo(tmp_path / f"fifo{suffix}")
    (tmp_path / f"link{suffix}").symlink_to(tmp_path / "gone")
    for name, message in (
        ("folder", "is a folder, not a file; name a file in it"),
        ("fifo", "is no regular file"),
        ("link", "it is a link to .*gone, which does not exist"),
        ("missing", "there is no file .*missing"),
        ("n" * 300, "cannot be read: File name too long"),
        ("nu\0ll", "there is no file"),
    ):
        with pytest.raises(kind, match=message):
            read(tmp_path / f"{name}{suffix}")


def _good(suffix: str) -> bytes:
    arrays = {"inputs": np.random.default_rng(0).standard_normal((6, 4)).astype("f4"), "labels": np.arange(6)}
    buffer = io.BytesIO()
    if suffix == ".npy":
        np.save(buffer, arrays["inputs"])
    elif suffix in (".npz", ".compressed.npz"):
        (np.savez if suffix == ".npz" else np.savez_compressed)(buffer, **arrays)
    elif suffix == ".safetensors":
        return save_tensors({name: torch.from_numpy(array) for name, array in arrays.items()})
    else:
        state = {name: torch.from_numpy(array) for name, array in arrays.items()}
        torch.save(state, buffer, _use_new_zipfile_serialization=suffix == ".pt")
    return buffer.getvalue()


KINDS = [".npy", ".npz", ".compressed.npz", ".safetensors", ".pt", ".legacy.pt"]


def _outcome(path: Path) -> str:
    """Read as data and as weights: "read", or vfx's own error; any other is raised."""
    for read in (read_labelled, load) if path.suffix in (".pt", ".safetensors") else (read_labelled,):
        try:
            read(path)
        except VfxError as error:
            return type(error).__name__ if path.name in str(error) else f"not named: {error}"
    return "read"


@pytest.mark.parametrize("kind", KINDS)
def test_good_files_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"data{kind}"
    path.write_bytes(_good(kind))
    assert _outcome(path) == "read"
    assert read_inputs(path).shape == (6, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_file_ends_in_an_error_of_its_own(tmp_path: Path, kind: str) -> None:
    path, good = tmp_path / f"data{kind}", _good(kind)
    for share in range(1, 20):
        path.write_bytes(good[: len(good) * share // 20])
        assert _outcome(path) in ("DataError", "CheckpointError")


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bytes_never_give_a_raw_exception(tmp_path: Path, kind: str) -> None:
    path, good, generator = tmp_path / f"data{kind}", _good(kind), random.Random(0)
    outcomes = set()
    for _ in range(150):
        damaged = bytearray(good)
        for _ in range(generator.choice([1, 2, 8])):
            damaged[generator.randrange(min(len(damaged), 2000))] = generator.randrange(256)
        path.write_bytes(damaged)
        outcomes.add(_outcome(path))
    assert outcomes & {"DataError", "CheckpointError"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("words.npy", np.array(["a", "b"]), "is damaged, or holds no arrays"),
        ("objects.npy", np.array([{}, None]), "allow_pickle=False"),
        ("number.npy", np.array(3.0), "holds no arrays with an axis of samples"),
    ],
)
def test_arrays_that_are_no_samples_are_refused(tmp_path: Path, name: str, value: Any, message: str) -> None:
    np.save(tmp_path / name, value)
    with pytest.raises(DataError, match=message):
        read_inputs(tmp_path / name)


@pytest.mark.parametrize("name", ["A.PT2", "a.Onnx", "A.SAFETENSORS"])
def test_the_case_of_a_suffix_does_not_matter(tmp_path: Path, name: str) -> None:
    network = nn.Linear(3, 2)
    assert load(export(network, tmp_path / name, torch.randn(2, 3))) is not None
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("kind", ["meta", "sparse", "nested"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own: nested tensors are a prototype
def test_data_that_is_no_plain_array_is_refused(tmp_path: Path, kind: str) -> None:
    x = torch.ones(3, 4)
    odd = {"meta": x.to("meta"), "sparse": x.to_sparse(), "nested": torch.nested.nested_tensor(list(x))}
    torch.save({"inputs": odd[kind]}, tmp_path / "data.pt")
    with pytest.raises(CheckpointError, match=r"data.pt: 'inputs' (has a shape and no values|is a nested)"):
        read_inputs(tmp_path / "data.pt")


def test_text_beside_the_arrays_of_an_archive_is_no_hindrance(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", inputs=np.ones((3, 2)))
    with zipfile.ZipFile(tmp_path / "data.npz", "a") as archive:
        archive.writestr("readme.txt", "what the arrays are")
    assert read_inputs(tmp_path / "data.npz").shape == (3, 2)


@pytest.mark.parametrize("dtype", [">f4", ">i8", "<f8", "u1", "?"])
def test_arrays_in_the_byte_order_of_other_machines_are_read(tmp_path: Path, dtype: str) -> None:
    values = np.arange(6).reshape(3, 2).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    np.testing.assert_array_equal(read_inputs(tmp_path / "a.npy").numpy(), values)


def test_a_tensor_alone_is_data(tmp_path: Path) -> None:
    x = torch.randn(5, 3)
    torch.save(x, tmp_path / "x.pt")
    assert torch.equal(read_inputs(tmp_path / "x.pt"), x)
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"cannot read .csv as data; known: .npy, .npz"):
        read_inputs(tmp_path / "x.csv")


def test_code_in_other_formats_is_called_so(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"needs code to be unpickled .*torch.nn.modules.linear.Linear"):
        load(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"needs code to be unpickled"):
        read_inputs(tmp_path / "model.pt")


@pytest.mark.parametrize("content", [b"\x80", b"\x80\x02", b"P", b"PK", b"PK\x03\x04", b"\x93NUMPY"])
@pytest.mark.parametrize(("read", "suffix", "kind"), READERS)
def test_files_that_end_after_their_first_bytes_are_refused(
    tmp_path: Path, read: Callable[..., Any], suffix: str, kind: Any, content: bytes
) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(kind):
        read(path)

"""The readers of ``vfx.data``: what they give, their own normalisation, and what they refuse."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vfx.capture.signature import Call
from vfx.data import ImageFolder, cifar10, cifar100, digits, fashion_mnist, mnist, preprocessing, read, text_file
from vfx.data.mnist import FASHION_MNIST
from vfx.data.pickles import read_arrays
from vfx.errors import ArgumentError, DataError

IMAGE = torch.zeros(2, 3, 16, 16)


def _idx(path: Path, array: np.ndarray) -> None:
    data = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def _mnist(folder: Path, suffix: str = "") -> np.ndarray:
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)
    for part in ("train", "t10k"):
        _idx(folder / f"{part}-images-idx3-ubyte{suffix}", pixels)
        _idx(folder / f"{part}-labels-idx1-ubyte{suffix}", np.arange(5, dtype=np.uint8))
    return pixels


@pytest.mark.parametrize(("layout", "suffix"), [("", ""), ("raw", ".gz"), ("MNIST/raw", "")])
def test_mnist_in_every_layout(layout: str, suffix: str, tmp_path: Path) -> None:
    pixels = _mnist(tmp_path / "root" / layout, suffix)
    images, labels = mnist(tmp_path / "root", "test", samples=3)
    assert images.shape == (3, 1, 32, 32)
    assert labels.tolist() == [0, 1, 2]
    expected = (torch.from_numpy(pixels[:3]).float() / 255 - 0.1307) / 0.3081
    assert torch.equal(images[:, 0, 2:-2, 2:-2], expected)
    assert float(images[0, 0, 0, 0]) == pytest.approx(-0.1307 / 0.3081)
    assert mnist(tmp_path / "root", size=28)[0].shape == (5, 1, 28, 28)


def test_idx_files_that_are_damaged_or_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no MNIST file train-images.*download"):
        mnist(tmp_path)
    folder = tmp_path / "root"
    _mnist(folder)
    images = folder / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(DataError, match="damaged: it holds 3919 bytes"):
        mnist(folder)
    images.write_bytes(b"\x00\x00\x0d\x03" + bytes(12))
    with pytest.raises(DataError, match="no idx file of bytes"):
        mnist(folder)
    with pytest.raises(ArgumentError, match="padded to an even size"):
        mnist(folder, size=33)
    with pytest.raises(ArgumentError, match="part='t10k'"):
        mnist(folder, "t10k")


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_is_found_by_itself() -> None:
    images, labels = fashion_mnist(part="train", size=28)
    assert len(images) == len(labels) == 60_000
    assert abs(float(images.double().mean())) < 1e-3
    assert abs(float(images.double().std()) - 1) < 1e-3


def _cifar(folder: Path, protocol: int = 2) -> np.ndarray:
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), np.uint8)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        with (folder / name).open("wb") as file:
            pickle.dump({"data": pixels, "labels": [3, 1, 4, 1], "batch_label": name}, file, protocol)
    return pixels


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_cifar_pickles_are_read_without_pickle(protocol: int, tmp_path: Path) -> None:
    pixels = _cifar(tmp_path / "cifar-10-batches-py", protocol)
    images, labels = cifar10(tmp_path, samples=6)
    assert labels.tolist() == [3, 1, 4, 1, 3, 1]
    mean, std = torch.tensor((0.4914, 0.4822, 0.4465)), torch.tensor((0.2470, 0.2435, 0.2616))
    expected = (torch.from_numpy(pixels).view(4, 3, 32, 32).float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert torch.equal(images[:4], expected)
    assert torch.equal(cifar10(tmp_path / "cifar-10-batches-py", "test")[0], expected)


def test_python_2_pickles_of_torchvisions_download(tmp_path: Path) -> None:
    """As CIFAR's authors wrote them: protocol 2, texts of Python 2, NumPy 1."""
    pixels = np.arange(2 * 3072, dtype=np.uint32).astype(np.uint8)
    short = lambda text: b"U" + bytes((len(text),)) + text.encode()  # noqa: E731
    dtype = (
        b"cnumpy\ndtype\n("
        + short("u1")
        + b"K\x00K\x01tR(K\x03"
        + short("|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + short("b") + b"tR(K\x01(K\x02M\x00\x0ct"
    )
    array += dtype + b"\x89T" + struct.pack("<I", len(pixels)) + pixels.tobytes() + b"tb"
    stream = b"\x80\x02}(" + short("data") + array + short("fine_labels") + b"](K\x07K\x63eu."
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "test").write_bytes(stream)
    images, labels = cifar100(tmp_path, "test")
    assert labels.tolist() == [7, 99]
    raw = (images * torch.tensor((0.2673, 0.2564, 0.2762)).view(3, 1, 1)) + torch.tensor((0.5071, 0.4865, 0.4409)).view(
        3, 1, 1
    )
    assert torch.equal((raw * 255).round().to(torch.uint8).reshape(-1), torch.from_numpy(pixels))


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"data": _Evil()}, "posix.system"),
        ({"data": np.zeros(3, object)}, "other values than unsigned bytes"),
        ({"data": np.zeros(3, np.float64)}, "other values than unsigned bytes"),
        ([1, 2], "a list instead of a dict"),
    ],
)
def test_pickles_that_need_code_are_refused(
    value: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "data_batch_1"
    file.write_bytes(pickle.dumps(value, 2))
    with pytest.raises(DataError, match=message):
        read_arrays(file)
    assert not (tmp_path / "pwned").exists()


def test_a_pickle_cannot_change_its_reader(tmp_path: Path) -> None:
    """BUILD on a name sets attributes of what stands for it, unless that refuses."""
    file = tmp_path / "data_batch_1"
    for name in (b"c_codecs\nencode\n", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n"):
        file.write_bytes(b"\x80\x02" + name + b"}U\x01aK\x01sb.")
        with pytest.raises(DataError, match="refused or damaged"):
            read_arrays(file)


def test_cifar_binary_files(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 100, (3, 2 + 3072), np.uint8)
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    rows.tofile(folder / "train.bin")
    images, labels = cifar100(tmp_path)
    assert labels.tolist() == rows[:, 1].tolist()
    assert float(images[0, 0, 0, 0]) == pytest.approx((rows[0, 2] / 255 - 0.5071) / 0.2673, abs=1e-6)
    (folder / "train.bin").write_bytes(b"abc")
    with pytest.raises(DataError, match="no images of 3074"):
        cifar100(tmp_path)
    with pytest.raises(DataError, match=r"no CIFAR10 files data_batch_1.*torchvision\.datasets\.CIFAR10"):
        cifar10(tmp_path)


def _images(folder: Path, count: int = 3, size: tuple[int, int] = (40, 30)) -> None:
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(generator.integers(0, 256, (*size[::-1], 3), np.uint8)).save(folder / name / f"{index}.png")


def test_a_folder_of_images_is_streamed_in_one_order(tmp_path: Path) -> None:
    _images(tmp_path)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    batches = read(f"folder:{tmp_path}", example_inputs=IMAGE)
    assert len(batches) == 1
    first, second = list(batches), list(batches)
    images, labels = first[0]
    assert images.shape == (6, 3, 16, 16)
    assert sorted(labels.tolist()) == [0] * 3 + [1] * 3
    assert labels.tolist() != sorted(labels.tolist())  # the first samples hold all classes
    assert torch.equal(images, second[0][0])
    assert ImageFolder(tmp_path, preprocessing((3, 8, 8))).classes == ("cat", "dog")
    assert len(read(f"folder:{tmp_path}?samples=2", example_inputs=IMAGE).files) == 2
    (tmp_path / "dog" / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    with pytest.raises(DataError, match=r"broken\.jpg cannot be read"):
        list(read(f"folder:{tmp_path}", example_inputs=IMAGE))


def test_a_folder_in_parts_and_folders_that_are_none(tmp_path: Path) -> None:
    _images(tmp_path / "train", 4)
    _images(tmp_path / "val", 1)
    assert len(read(f"folder:{tmp_path}", example_inputs=IMAGE).files) == 8
    assert len(read(f"folder:{tmp_path}", part="test", example_inputs=IMAGE).files) == 2
    with pytest.raises(DataError, match="there is no folder"):
        read(f"folder:{tmp_path}/nothing", example_inputs=IMAGE)
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with pytest.raises(DataError, match="no images in folders"):
        read(f"folder:{tmp_path}/empty", example_inputs=IMAGE)


def test_images_become_inputs_as_torchvision_and_timm_do_it() -> None:
    timm = pytest.importorskip("timm")
    from torchvision.models import ResNet18_Weights

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 411, 3), np.uint8))
    expected = ResNet18_Weights.DEFAULT.transforms()(image)
    assert torch.equal(preprocessing((3, 224, 224), "torchvision:resnet18")(image), expected)
    assert torch.equal(preprocessing((3, 224, 224), "torchvision.models:resnet18")(image), expected)
    config = timm.data.resolve_data_config({}, pretrained_cfg=timm.models.get_pretrained_cfg("resnet18").to_dict())
    theirs = timm.data.create_transform(**config, is_training=False)(image)
    assert torch.equal(preprocessing((3, 224, 224), "timm:resnet18")(image), theirs)
    assert not torch.equal(theirs, expected)  # bicubic there, bilinear here: each its own
    assert preprocessing((3, 64, 64), "torchvision:resnet18")(image).shape == (3, 64, 64)


def test_images_of_other_shapes_and_wishes() -> None:
    image = Image.new("RGB", (50, 20), (255, 0, 0))
    assert torch.allclose(
        preprocessing((3, 10, 24), mean=0.5, std=0.5)(image)[:, 0, 0], torch.tensor((1.0, -1.0, -1.0))
    )
    grey = preprocessing((1, 12, 12))(image)
    assert grey.shape == (1, 12, 12)
    with pytest.raises(ArgumentError, match="3, height, width"):
        preprocessing((4, 8, 8))
    with pytest.raises(ArgumentError, match="one for each of 3 channels"):
        preprocessing((3, 8, 8), mean=[0.1, 0.2])


def test_text_by_characters_and_by_a_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("hello world é " * 40)
    tokens, following = text_file(file, 8)
    assert tokens.shape[1] == 8
    assert torch.equal(tokens[0, 1:], following[0, :-1])
    assert int(tokens[0, 0]) == 1 + ord("h") - 32
    call = {"input_ids": torch.zeros(2, 6, dtype=torch.long), "attention_mask": torch.ones(2, 6)}
    (batch, *_) = read(f"text:{file}", part="test", example_inputs=call)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"hello": 0, "world": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "tok").mkdir()
    words.save(str(tmp_path / "tok" / "tokenizer.json"))
    assert text_file(file, 3, tokenizer=str(tmp_path / "tok"))[0][0].tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="nothing is downloaded"):
        text_file(file, 3, tokenizer="gpt2")
    with pytest.raises(DataError, match="shorter than the 1001 tokens"):
        text_file(file, 1000)


def test_objects_of_the_users_own_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\nloader = [(torch.ones(2, 3), torch.zeros(2))]\ndef make(n=1):\n    return loader * n\n"
    )
    assert len(read(f"{file}:loader")) == 1
    assert len(read(f"{file}:make?n=3")) == 3
    with pytest.raises(ArgumentError, match=r"cannot be read: TypeError: make\(\) got an unexpected"):
        read(f"{file}:make?m=3")
    with pytest.raises(ArgumentError, match="has no 'other'"):
        read(f"{file}:other")
    with pytest.raises(ArgumentError, match="there is no file"):
        read(f"{tmp_path}/none.py:loader")
    file.with_name("broken.py").write_text("1 / 0\n")
    with pytest.raises(ArgumentError, match="ZeroDivisionError: division by zero"):
        read(f"{tmp_path}/broken.py:loader")


def test_named_sources_and_what_they_do_not_take(tmp_path: Path) -> None:
    images: Tensor = torch.cat([batch[0] for batch in read("digits?size=8", part="test")])
    assert torch.equal(images, digits(8)[2])
    assert read("digits", example_inputs=Call((torch.zeros(1, 1, 16, 16),)))[0][0].shape[1:] == (1, 16, 16)
    with pytest.raises(ArgumentError, match="takes no 'sizes'; it takes size, seed"):
        read("digits?sizes=8")
    with pytest.raises(DataError, match="one of digits, fashion-mnist"):
        read("digit")
    named = next(iter(read("digits?size=8", example_inputs=Call((), {"pixel_values": torch.zeros(2, 1, 8, 8)}))))
    assert set(named) == {"pixel_values", "labels"}

"""The catalogue of data: one line a source, and ``read``, which finds the one that a text names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vfx.address import Address, address, check_options
from vfx.capture.signature import Call, as_call
from vfx.data.arrays import read_batches, read_labelled
from vfx.data.batches import Mapped, in_batches
from vfx.data.cifar import cifar10, cifar100
from vfx.data.digits import digits
from vfx.data.folder import ImageFolder, part_of
from vfx.data.mnist import fashion_mnist, mnist
from vfx.data.preprocessing import preprocessing
from vfx.data.text import text_file
from vfx.errors import ArgumentError, DataError
from vfx.imports import is_code, load_object


@dataclass(frozen=True)
class Request:
    """What a source is asked for: ``part`` "train" to calibrate or "test" to measure, for the network's ``call``."""

    place: Address
    part: str
    call: Call | None
    model: str

    @property
    def folder(self) -> str | None:
        """What stands behind the colon."""
        return self.place.where or None

    @property
    def sample(self) -> tuple[int, ...] | None:
        """The shape of one sample of the first input, without the batch."""
        tensors = self.call.tensors() if self.call is not None else []
        return tuple(tensors[0].shape[1:]) if tensors else None

    def size(self, usual: int) -> dict[str, int]:
        """The side of the network's images, where they are known to be square."""
        shape = self.sample
        return {"size": shape[-1] if shape is not None and len(shape) == 3 and shape[-1] == shape[-2] else usual}


class Source(NamedTuple):
    read: Callable[..., Any]  # of a Request and the address's options
    summary: str


def _digits(request: Request, *, size: int | None = None, seed: int = 0) -> Any:
    parts = digits(**(request.size(32) if size is None else {"size": size}), seed=seed)
    return in_batches(parts[:2] if request.part == "train" else parts[2:])


def _squares(read: Callable[..., Any]) -> Callable[..., Any]:
    def images(request: Request, *, samples: int | None = None, size: int | None = None) -> Any:
        side = request.size(32) if size is None else {"size": size}
        return in_batches(read(request.folder, request.part, samples=samples, **side))

    return images


def _colours(read: Callable[..., Any]) -> Callable[..., Any]:
    def images(request: Request, *, samples: int | None = None) -> Any:
        return in_batches(read(request.folder, request.part, samples=samples))

    return images


def _folder(
    request: Request, *, samples: int | None = None, seed: int = 0, mean: Any = None, std: Any = None,
    resize: int | None = None,
) -> Any:  # fmt: skip
    if request.folder is None or request.sample is None:
        raise ArgumentError("folder:PATH needs the folder, and the shape of the network's input")
    transform = preprocessing(request.sample, request.model, mean=mean, std=std, resize=resize)
    return ImageFolder(part_of(request.folder, request.part), transform, samples=samples, seed=seed)


def _text(
    request: Request, *, tokenizer: str | None = None, context: int | None = None, stride: int | None = None,
    samples: int | None = None, labels: bool = True,
) -> Any:  # fmt: skip
    if request.folder is None or (context is None and not request.sample):
        raise ArgumentError("text:FILE needs the file, and context= or the shape of the network's input")
    length = context if context is not None else (request.sample or (0,))[-1]
    pair = text_file(request.folder, length, request.part, tokenizer=tokenizer, stride=stride)
    return in_batches([tensor[:samples] for tensor in pair[: 2 if labels else 1]])


SOURCES: Mapping[str, Source] = {
    "digits": Source(_digits, "scikit-learn's handwritten digits, offline"),
    "fashion-mnist": Source(_squares(fashion_mnist), "idx files in fashion-mnist:FOLDER, Debian's found by itself"),
    "mnist": Source(_squares(mnist), "idx files in mnist:FOLDER"),
    "cifar10": Source(_colours(cifar10), "torchvision's files, or binary ones, in cifar10:FOLDER"),
    "cifar100": Source(_colours(cifar100), "torchvision's files, or binary ones, in cifar100:FOLDER"),
    "folder": Source(_folder, "images in folder:PATH, a folder for each class"),
    "text": Source(_text, "a text file, text:FILE, by characters or ?tokenizer=FOLDER"),
}


def read(source: str, *, part: str = "train", example_inputs: Any = None, model: str = "") -> Any:
    """Batches of what ``source`` names: a name of ``SOURCES``, a file of arrays, or ``file.py:loader``.

    ``part``: "train" for what calibrates, "test" for what measures, where a source has both. ``example_inputs``: the
    network's, as for ``vfx.merge``: shapes say how large images are, keyword arguments name what a batch holds.
    ``model``: as on the command line, for its own preprocessing of images. Labels stand behind the inputs.
    Raises ArgumentError, DataError, CheckpointError.

    >>> batches = read("fashion-mnist?samples=1000", part="test")
    """
    place, call = address(source), None if example_inputs is None else as_call(example_inputs)
    if place.name in SOURCES:
        chosen = SOURCES[place.name].read
        check_options(chosen, place.options, f"data {place.name!r}")
        return _by_name(chosen(Request(place, part, call, model), **place.options), call)
    if is_code(source):
        return _own(source, place)
    if not Path(source).exists() and not Path(source).suffix:
        raise DataError(f"no data {source!r}: a file of arrays, file.py:loader, or one of {', '.join(SOURCES)}")
    if call is not None and call.kwargs:
        return read_batches(Path(source), list(call.kwargs))
    return read_labelled(Path(source))


def _own(source: str, place: Address) -> Any:
    """The user's own batches, or what their function gives. Raises ArgumentError where they cannot be had."""
    loaded = load_object(source, "data")
    if not callable(loaded):
        return loaded
    try:
        return loaded(**place.options)
    except Exception as error:  # the user's own code raises any class
        cause = next(iter(str(error).splitlines()), "no message")
        raise ArgumentError(f"data {source!r} cannot be read: {type(error).__name__}: {cause}") from error


def _by_name(batches: Any, call: Call | None) -> Any:
    """Batches (inputs, labels) as dicts for a network that takes keyword arguments.

    The first argument holds the inputs; masks that are ones in the example are ones, token types zeros.
    """
    if call is None or call.args or not call.kwargs:
        return batches
    first, *others = call.kwargs
    fill = {"attention_mask": 1, "token_type_ids": 0}
    unknown = [name for name in others if name not in fill]
    if unknown:
        raise ArgumentError(f"these data hold {first} alone; give {', '.join(unknown)} in a file of arrays as well")

    def named(batch: tuple[Any, ...]) -> dict[str, Any]:
        filled = {name: torch.full(batch[0].shape[:2], fill[name]) for name in others}
        return {first: batch[0], **filled, **({"labels": batch[1]} if len(batch) > 1 else {})}

    return Mapped(batches, named)

"""Packages that not every user needs: which extra of vfx installs each, and the one error that says so."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from vfx.errors import MissingExtraError

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "plots": ("matplotlib",),
    "zoo": ("torchvision", "timm", "transformers", "tokenizers", "huggingface_hub"),
}
WRITERS = {".onnx": "onnx", ".png": "plots", ".svg": "plots", ".pdf": "plots"}  # what writes a file of this suffix


def need(package: str, what: str) -> None:
    """Raise MissingExtraError unless ``package`` is installed; nothing is imported. ``what`` needs it."""
    if importlib.util.find_spec(package) is None:
        raise missing(package, what)


def need_writer(suffix: str) -> None:
    """Raise MissingExtraError unless a file of this suffix could be written."""
    for package in EXTRAS.get(WRITERS.get(suffix.lower(), ""), ()):
        need(package, f"writing {suffix.lower()}")


@contextmanager
def needed_for(what: str) -> Iterator[None]:
    """Around imports: a package that is not there gives MissingExtraError.

    >>> with needed_for("figures"):
    ...     from matplotlib.figure import Figure
    """
    try:
        yield
    except ImportError as error:
        if extra_of(error.name or "") is None:
            raise
        raise missing(error.name or "", what) from error


def extra_of(package: str) -> str | None:
    """The extra that installs a package (or the package of a module); None if it is none's."""
    top = package.partition(".")[0]
    return next((extra for extra, packages in EXTRAS.items() if top in packages), None)


def missing(package: str, what: str) -> MissingExtraError:
    """What to raise where ``what`` needs a package that is not there."""
    top, extra = package.partition(".")[0], extra_of(package)
    return MissingExtraError(f"{what} needs the package {top}, which is not installed: pip install 'vfx[{extra}]'")

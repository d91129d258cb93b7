"""Mistakes that can be seen before anything heavy is imported, so that they are answered at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from vfx.address import address
from vfx.cli.names import names_in
from vfx.errors import ArgumentError
from vfx.imports import is_code
from vfx.shards import require_weights

_INPUT = re.compile(r"(?:\w+=)?(?:\d+(?:x\d+)*)?(?::(?:\d+|ones))?", re.IGNORECASE)


def check_network(model: str | None, paths: Iterable[Path], inputs: Iterable[str] = ()) -> None:
    """Raise for a model, an input or a checkpoint that cannot be one: ArgumentError, CheckpointError."""
    if model is not None and not is_code(model) and address(model).name not in names_in("models/named.py", "FAMILIES"):
        families = ", ".join(f"{name}:…" for name in names_in("models/named.py", "FAMILIES"))
        raise ArgumentError(f"--model {model!r} must be one of {families}, module:name or ./file.py:name")
    for text in inputs:
        if not _INPUT.fullmatch(text):
            raise ArgumentError(
                "--input takes the shape of one sample, e.g. 3x32x32, with name= for keyword arguments and :1000 for "
                f"integers below 1000 (:ones for ones), e.g. input_ids=16:1000; got {text!r}"
            )
    for path in paths:
        require_weights(path)


def check_models(models: Sequence[str], checkpoints: Sequence[Path]) -> None:
    """Raise ArgumentError unless there is a model for all checkpoints, or one for each."""
    if len(models) not in (1, len(checkpoints)):
        raise ArgumentError(
            f"--model stands once, or once for each of {len(checkpoints)} checkpoints in their order; got {len(models)}"
        )
    for model in models:
        check_network(model, ())

"""ONNX export through torch's dynamo exporter, checked in ONNX Runtime before the file appears."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from vfx.analyse.verify import tensors
from vfx.errors import VerificationError
from vfx.files import write_atomic

TOLERANCE = 1e-4  # absolute, and relative to the output's largest value where that exceeds 1
BATCHES = (1, 7)
_PROTOBUF_LIMIT = 2**31  # bytes: a larger network cannot be one file


def export_onnx(module: nn.Module, path: Path, inputs: tuple[Any, ...], seed: int = 0) -> float:
    """Write ``module`` with a dynamic batch; returns its largest difference to the module in ONNX Runtime.

    Raises VerificationError, and writes nothing, if ONNX Runtime differs by more than 1e-4 at batch 1 or 7.
    """
    module = module.to("cpu").eval()
    batch = torch.export.Dim("batch", min=1)
    shapes = tuple({0: batch} if isinstance(x, Tensor) and x.ndim else None for x in inputs)
    with _quiet(), torch.no_grad():
        exported = torch.onnx.export(module, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert exported is not None
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "draft.onnx"
        exported.save(str(draft), external_data=False)
        onnx.checker.check_model(str(draft))
        worst = _compare(module, draft, inputs, seed)
        write_atomic(path, draft.read_bytes())
    return worst


@torch.no_grad()
def _compare(module: nn.Module, file: Path, inputs: tuple[Any, ...], seed: int) -> float:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for batch in BATCHES:
        fresh = [_fresh(x, batch, generator) for x in inputs]
        expected = tensors(module(*fresh))
        feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), fresh)}
        for index, (want, got) in enumerate(zip(expected, session.run(None, feeds), strict=True)):
            error = float(np.abs(want.numpy() - got).max() / max(1.0, float(want.abs().max())))
            if not error <= TOLERANCE:
                raise VerificationError(
                    f"ONNX Runtime differs from the module by {error:.1e} in output {index} at batch {batch}; "
                    "nothing was written. Export as .pt2 and report the operator mix"
                )
            worst = max(worst, error)
    return worst


def _fresh(x: Any, batch: int, generator: torch.Generator) -> Any:
    if not isinstance(x, Tensor) or not x.ndim:
        return x
    if x.is_floating_point():
        return torch.randn((batch, *x.shape[1:]), generator=generator).to(x.dtype)
    return x[torch.randint(len(x), (batch,), generator=generator)]


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's own progress lines and deprecation warnings say nothing about the user's network."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)

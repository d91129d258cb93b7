"""ONNX export through torch's dynamo exporter, checked in ONNX Runtime before the file appears."""

from __future__ import annotations

import logging
import re
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

from vfx.errors import ArgumentError, VerificationError
from vfx.exporting import exported
from vfx.files import write_atomic
from vfx.outputs import named_tensors, plain
from vfx.signature import Call, batch_size

TOLERANCE = 1e-4  # absolute, and relative to the output's largest value where that exceeds 1
BATCHES = (1, 7)
_PROTOBUF_LIMIT = 2**31  # bytes: a larger network cannot be one file


def export_onnx(module: nn.Module, path: Path, call: Call, seed: int = 0) -> float:
    """Write ``module`` with a dynamic batch; returns its largest difference to the module in ONNX Runtime.

    Inputs are called like forward's arguments, outputs like the keys of a dict that forward returns.
    Raises VerificationError, and writes nothing, if ONNX Runtime differs by more than 1e-4 at batch 1 or 7.
    """
    module = module.to("cpu").eval()
    with _quiet(), torch.no_grad():
        program, _ = exported(module, call)
        names = _names(module, call)
        try:
            onnx_program = torch.onnx.export(program, (), dynamo=True, verbose=False, output_names=names)
        except torch.onnx.OnnxExporterError as error:
            cause = str(error.__cause__ or error).strip().splitlines()[0]
            raise ArgumentError(f"torch's exporter cannot write this network as ONNX: {cause}; use .pt2") from error
    assert onnx_program is not None
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "draft.onnx"
        onnx_program.save(str(draft), external_data=False)
        onnx.checker.check_model(str(draft))
        worst = _compare(module, draft, call, seed)
        write_atomic(path, draft.read_bytes())
    return worst


def _names(module: nn.Module, call: Call) -> list[str] | None:
    """Names of the outputs, where forward gives them any."""
    value = plain(module(*call.args, **call.kwargs))
    return [re.sub(r"\W+", "_", path).strip("_") for path in named_tensors(value)] if isinstance(value, dict) else None


@torch.no_grad()
def _compare(module: nn.Module, file: Path, call: Call, seed: int) -> float:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for batch in BATCHES:
        fresh = _fresh(call, batch, generator)
        expected = named_tensors(module(*fresh.args, **fresh.kwargs)).values()
        feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), fresh.tensors(), strict=True)}
        for index, (want, got) in enumerate(zip(expected, session.run(None, feeds), strict=True)):
            error = float(np.abs(want.numpy() - got).max() / max(1.0, float(want.abs().max())))
            if not error <= TOLERANCE:
                raise VerificationError(
                    f"ONNX Runtime differs from the module by {error:.1e} in output {index} at batch {batch}; "
                    "nothing was written. Export as .pt2 and report the operator mix"
                )
            worst = max(worst, error)
    return worst


def _fresh(call: Call, batch: int, generator: torch.Generator) -> Call:
    """Random samples in place of the call's batch; integers are drawn from the examples' rows."""
    size = batch_size(call.tensors())

    def sample(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.ndim or x.shape[0] != size:
            return x
        if x.is_floating_point():
            return torch.randn((batch, *x.shape[1:]), generator=generator).to(x.dtype)
        return x[torch.randint(len(x), (batch,), generator=generator)]

    return call.map(sample)


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

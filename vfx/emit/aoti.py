"""AOTInductor packages: the network compiled for this machine, run and compared in a process of its own.

What the package computes is compared before the file appears. The library is loaded by that process alone, so a
library that crashes ends neither the caller nor leaves a file.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vfx.capture.exporting import EXPORTING, exported, kept_back
from vfx.capture.outputs import named_tensors
from vfx.capture.signature import Call
from vfx.emit.trials import Axes, trials
from vfx.errors import ArgumentError, VerificationError
from vfx.files import drafts_beside, move_into_place
from vfx.proof import SINGLE, error_to_size


def write_package(
    module: nn.Module, path: Path, call: Call, dynamic_shapes: Any, axes: Axes, metadata: Mapping[str, str]
) -> float:
    """Compile ``module`` for this machine's processor; returns its largest difference to the module.

    Raises ArgumentError where it cannot be compiled, VerificationError, and writes nothing, where the package cannot be
    run or differs by more than 1e-4 at batch 1 or 7; OutputError.
    """
    module = module.to("cpu").eval()
    tried = list(trials(module, call, dynamic_shapes, axes))
    with drafts_beside(path) as folder:
        package = folder / "package.pt2"  # as torch wants it called
        _compile(module, call, dynamic_shapes, package, metadata)
        worst = _compare(module, package, [trial for _, trial in tried], folder)
        move_into_place(package, path)
    return worst


def _compile(module: nn.Module, call: Call, dynamic_shapes: Any, package: Path, metadata: Mapping[str, str]) -> None:
    program, _ = exported(module, call, dynamic_shapes)
    said = io.StringIO()
    try:
        with EXPORTING, torch.no_grad(), warnings.catch_warnings(), kept_back(said):
            warnings.simplefilter("ignore")  # of torch, about its own parts
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(package), inductor_configs={"aot_inductor.metadata": dict(metadata)}
            )
    except Exception as error:  # the compiler raises many unrelated classes, and g++ its own
        cause = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ArgumentError(
            f"AOTInductor cannot compile this network (it needs a C++ compiler): {cause}; use .onnx or .pt2"
        ) from error


@torch.no_grad()
def _compare(module: nn.Module, package: Path, calls: list[Call], folder: Path) -> float:
    """The largest difference between a package, run by another process, and the module."""
    inputs, outputs = folder / "inputs.pt", folder / "outputs.pt"
    torch.save([[list(call.args), dict(call.kwargs)] for call in calls], inputs)
    command = [sys.executable, "-m", "vfx.emit.aoti_run", str(package), str(inputs), str(outputs)]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": _paths()})
    if ended.returncode != 0:
        last = " ".join(ended.stderr.strip().splitlines()[-1:]) or f"status {ended.returncode}"
        raise VerificationError(f"the compiled network does not run: {last}; nothing was written. Use .onnx or .pt2")
    worst = 0.0
    for call, given in zip(calls, torch.load(outputs, weights_only=True), strict=True):
        wanted = named_tensors(module(*call.args, **call.kwargs))
        gaps = [error_to_size(want, got, least=1.0) for want, got in zip(wanted.values(), given, strict=True)]
        if not max(gaps) <= SINGLE:
            raise VerificationError(
                f"the compiled network differs from the module by {max(gaps):.1e} with inputs {call}; nothing was "
                "written. Export as .pt2 and report the operator mix"
            )
        worst = max(worst, *gaps)
    return worst


def _paths() -> str:
    """Where this process finds its modules, for one that starts elsewhere."""
    return os.pathsep.join(path for path in sys.path if path)

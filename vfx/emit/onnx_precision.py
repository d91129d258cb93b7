"""Fewer bits in an ONNX graph, by ONNX Runtime's own tools: float16, and int8 calibrated on data.

Inputs and outputs keep their types. float16 takes half the room; weights or activations beyond 65,504 do not fit. int8
is quantize_static: QDQ nodes, weights per channel, the ranges of activations those that the calibration data show.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vfx.capture.outputs import named_tensors
from vfx.errors import VerificationError
from vfx.extras import needed_for
from vfx.program import Program
from vfx.statistics.data import Batches

with needed_for("ONNX"):
    import onnx
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

LARGEST = float(np.finfo(np.float16).max)
NOISE = 0.3  # largest error of int8, as a share of an output's standard deviation over the calibration data


def in_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network with its weights and what it computes in float16. Raises VerificationError for weights beyond it."""
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        most = np.abs(values).max(initial=0) if values.dtype.kind == "f" else 0
        if most > LARGEST:
            raise VerificationError(
                f"{tensor.name} holds {most:.3g}, and float16 ends at {LARGEST:,.0f}; nothing was written"
            )
    small = convert_float_to_float16(model, keep_io_types=True)
    OnnxModel.graph_topological_sort(small.graph)  # casts of the inputs were added at the end
    return small


class Calibration:
    """Batches of the network's inputs by the names of the graph's, read anew in every pass.

    ``program`` takes the inputs (their batches are checked against it), ``names`` are those in the graph.
    """

    def __init__(self, program: Program, names: Sequence[str], data: Any, max_samples: int | None):
        self.program, self.names = program, list(names)
        self.batches = Batches(program, data, max_samples)

    def __iter__(self) -> Iterator[tuple[list[Tensor], dict[str, np.ndarray]]]:
        for batch in self.batches:
            yield batch, {name: x.detach().cpu().numpy() for name, x in zip(self.names, batch, strict=True)}


class _Reader(CalibrationDataReader):
    """Calibration data as ONNX Runtime's quantiser asks for them."""

    def __init__(self, data: Calibration):
        self._feeds = (feeds for _, feeds in data)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def in_int8(model: onnx.ModelProto, data: Calibration, folder: Path) -> onnx.ModelProto:
    """The network quantised by ONNX Runtime. ``folder`` holds its drafts. Raises VerificationError where it fails."""
    prepared, small = folder / "prepared.onnx", folder / "int8.onnx"
    try:
        quant_pre_process(model, str(prepared), auto_merge=True)
        quantize_static(str(prepared), str(small), _Reader(data), per_channel=True)
        network = onnx.load(str(small))
    except Exception as error:  # the quantiser raises any class
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        raise VerificationError(f"ONNX Runtime cannot quantise this network: {cause}; nothing was written") from error
    return network


class Noise(NamedTuple):
    """Error of one output: its root mean square as a share of the output's standard deviation, and of which output."""

    share: float
    output: str


@torch.no_grad()
def noise(module: nn.Module, session: onnxruntime.InferenceSession, data: Calibration) -> Noise:
    """The largest error of a session's floating outputs towards the module's on the calibration data."""
    sums: dict[str, np.ndarray] = {}
    for batch, feeds in data:
        call = data.program.signature.call(batch)
        wanted = named_tensors(module(*call.args, **call.kwargs))
        for (path, want), got in zip(wanted.items(), session.run(None, feeds), strict=True):
            if not want.is_floating_point():
                continue
            exact = want.double().numpy()
            parts = (exact.size, exact.sum(), (exact**2).sum(), ((got.astype(np.float64) - exact) ** 2).sum())
            sums[path] = sums.get(path, np.zeros(4)) + np.array(parts)
    outputs = [Noise(_share(*total), path) for path, total in sums.items()]
    return max(outputs, key=lambda output: np.nan_to_num(output.share, nan=np.inf), default=Noise(0.0, ""))


def _share(count: float, total: float, squares: float, error: float) -> float:
    spread = squares / count - (total / count) ** 2
    return float(np.sqrt(error / count / max(spread, np.finfo(np.float64).tiny)))

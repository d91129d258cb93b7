"""An ``.onnx`` file as a network that can be run and measured: ONNX Runtime behind ``nn.Module``'s interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vfx.capture.signature import Call
from vfx.emit.files import load
from vfx.errors import ArgumentError, CheckpointError
from vfx.extras import needed_for

BATCH = 2  # where the file leaves a size open
_DTYPES = {
    "tensor(float)": torch.float32, "tensor(double)": torch.float64, "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64, "tensor(int32)": torch.int32, "tensor(bool)": torch.bool,
}  # fmt: skip


class OnnxNetwork(nn.Module):
    """The network in the file ``path``, called with its inputs in their order or by their names.

    It gives its output, or a dict of several by their names. ``stored`` and ``nonzeros`` count the numbers in the
    file's floating tensors. Raises CheckpointError for a file that is none, MissingExtraError without ONNX Runtime.

    >>> OnnxNetwork("merged.onnx")(images).argmax(1)
    """

    def __init__(self, path: str | Path):
        super().__init__()
        with needed_for("running .onnx"):
            import onnxruntime
            from onnx import numpy_helper
        graph = load(path).graph
        folder = str(Path(path).resolve().parent)
        arrays = [numpy_helper.to_array(tensor, folder) for tensor in graph.initializer]
        floating = [array for array in arrays if array.dtype.kind == "f"]
        self.stored = sum(array.size for array in floating)
        self.nonzeros = sum(int(np.count_nonzero(array)) for array in floating)
        try:
            self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors share no public class
            raise CheckpointError(f"{path} does not run: {str(error).splitlines()[0]}") from error
        self._inputs = self._session.get_inputs()
        self._outputs = [output.name for output in self._session.get_outputs()]

    def __deepcopy__(self, memo: Any) -> OnnxNetwork:
        return self  # it holds nothing that changes

    def example_call(self) -> Call:
        """A call with random numbers (zeros where they are no floating ones) of the shapes that the file names."""
        generator = torch.Generator().manual_seed(0)
        tensors = []
        for graph_input in self._inputs:
            if graph_input.type not in _DTYPES:
                raise ArgumentError(
                    f"input {graph_input.name!r} is a {graph_input.type}, which cannot be made up; give --input"
                )
            shape = [size if isinstance(size, int) else BATCH for size in graph_input.shape]
            dtype = _DTYPES[graph_input.type]
            tensors.append(torch.randn(shape, generator=generator).to(dtype) * dtype.is_floating_point)
        return Call(tuple(tensors))

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        names = [graph_input.name for graph_input in self._inputs]
        given = dict(zip(names, args)) | kwargs
        if len(args) > len(names) or set(given) != set(names):
            raise ArgumentError(f"the .onnx network takes {', '.join(names)}, got {', '.join(given)}")
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in given.items()}
        outputs = [torch.from_numpy(np.asarray(array)) for array in self._session.run(None, arrays)]
        return outputs[0] if len(outputs) == 1 else dict(zip(self._outputs, outputs))

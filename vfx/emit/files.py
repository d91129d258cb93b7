"""Export and load: one suffix, one format, one writer and one reader.

``.onnx`` for runtimes, ``.safetensors`` for state dicts of the user's own class, ``.pt2`` for GraphModules. Files are
written whole or not at all, and reading one never runs code from it.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, fx, nn

from vfx.capture import capture
from vfx.checks import check_finite, check_same_tensors
from vfx.emit.module import graph_module
from vfx.emit.onnx import export_onnx
from vfx.errors import ArgumentError, CheckpointError
from vfx.exporting import exported
from vfx.files import write_atomic
from vfx.pruning.masks import make_permanent
from vfx.signature import Call, as_call, batched_call, in_order


def export(model: Any, path: str | Path, example_inputs: Any = None) -> Path:
    """Write a merged network (a Result or a module with example inputs) in the format of ``path``'s suffix.

    ``.onnx`` is compared with the module in ONNX Runtime at two batch sizes first. ``.safetensors`` holds the state
    dict of a network of the user's own class; a GraphModule goes to ``.pt2``. Masks of ``vfx.prune`` become zeros.
    Raises ArgumentError, VerificationError; no partial file is left.
    """
    path = Path(path)
    module = model if isinstance(model, nn.Module) else model.module
    if example_inputs is None and not isinstance(model, nn.Module):
        example_inputs = model.program.example_call
    writer = _WRITERS.get(path.suffix)
    if writer is None:
        raise ArgumentError(f"cannot export to {path.suffix or 'a file without suffix'}; use {', '.join(_WRITERS)}")
    if not path.parent.is_dir():
        raise ArgumentError(f"the folder {path.parent} does not exist")
    writer(make_permanent(copy.deepcopy(module)).cpu().eval(), path, example_inputs)
    return path


def _write_onnx(module: nn.Module, path: Path, example_inputs: Any) -> None:
    export_onnx(module, path, _examples(module, example_inputs, "ONNX"))


def _write_safetensors(module: nn.Module, path: Path, example_inputs: Any) -> None:
    if isinstance(module, fx.GraphModule):
        raise ArgumentError("a GraphModule has no class to load a state dict into; export it to .pt2 or .onnx")
    write_atomic(path, save_tensors(_unshared(module.state_dict())))


def _write_pt2(module: nn.Module, path: Path, example_inputs: Any) -> None:
    program, _ = exported(module, _examples(module, example_inputs, ".pt2"))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    write_atomic(path, buffer.getvalue())


_WRITERS = {".onnx": _write_onnx, ".safetensors": _write_safetensors, ".pt2": _write_pt2}


def load(path: str | Path, model: nn.Module | None = None) -> Any:
    """Read a checkpoint without running code from it.

    ``.safetensors``, ``.pt`` and ``.pth`` give a state dict, or a copy of ``model`` that holds it; ``.pt2`` gives a
    GraphModule; ``.onnx`` gives the checked ONNX model. Raises CheckpointError, ArchitectureError, WeightError.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise CheckpointError(f"cannot read {path.suffix or 'a file without suffix'}; known: {', '.join(_READERS)}")
    value = reader(path)
    if not isinstance(value, dict):
        return value
    check_finite(value, path.name)
    return value if model is None else _filled(model, value, path.name)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_tensors(path.read_bytes())
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # foreign pickle protocols; what cannot be read raises
            value = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} needs code to be unpickled and is refused. Save a state dict instead: "
            "torch.save(model.state_dict(), path), or use safetensors"
        ) from error
    except (RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is not a torch checkpoint: {error}") from error
    if isinstance(value, dict) and not all(isinstance(x, Tensor) for x in value.values()):
        nested = (value.get(key) for key in ("state_dict", "model_state_dict", "model"))
        value = next((state for state in nested if isinstance(state, dict)), value)
    if not isinstance(value, dict) or not all(isinstance(x, Tensor) for x in value.values()):
        raise CheckpointError(f"{path} holds no state dict of tensors")
    return value


def _read_pt2(path: Path) -> nn.Module:
    try:
        program = torch.export.load(path)
    except Exception as error:  # the archive reader raises many unrelated classes
        raise CheckpointError(f"{path} is not an exported program: {error}") from error
    args, kwargs = program.example_inputs or ((), {})
    return graph_module(capture(program, Call(tuple(args), dict(kwargs))))


def _read_onnx(path: Path) -> Any:
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf's DecodeError is not public
        raise CheckpointError(f"{path} is not a valid ONNX model: {error}") from error
    return model


_READERS = {
    ".safetensors": _read_safetensors,
    ".pt": _read_pickle,
    ".pth": _read_pickle,
    ".pt2": _read_pt2,
    ".onnx": _read_onnx,
}


def _examples(module: nn.Module, example_inputs: Any, what: str) -> Call:
    if example_inputs is None:
        raise ArgumentError(f"{what} export of a module needs example_inputs")
    call = batched_call(in_order(module.forward, as_call(example_inputs), type(module).__name__))
    return call.map(lambda x: x.cpu() if isinstance(x, Tensor) else x)


def _unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no storage, as safetensors wants them."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}


def _filled(model: nn.Module, state: dict[str, Tensor], name: str) -> nn.Module:
    check_same_tensors(model.state_dict(), state, type(model).__name__, name)
    filled = copy.deepcopy(model)
    filled.load_state_dict(state, strict=True)
    return filled.eval()

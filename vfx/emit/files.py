"""Export and load: one suffix, one format, one writer and one reader.

``.onnx`` for runtimes, ``.safetensors`` for state dicts of the user's own class, ``.pt2`` for GraphModules, ``.aoti``
for compiled code, which is written only. Files are written whole or not at all, and reading one never runs code from
it.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, fx, nn

from vfx.archives import check_held
from vfx.arguments import checked
from vfx.capture.capture import capture
from vfx.capture.exporting import DYNAMIC_BATCH, captured_shapes, exported
from vfx.capture.signature import Call, as_call, batched_call, in_order
from vfx.checks import check_finite, check_storage, masks_of
from vfx.emit.checkpoints import choose, filled, in_dtype
from vfx.emit.module import graph_module
from vfx.emit.provenance import provenance
from vfx.emit.pt2 import read_program, write_program
from vfx.emit.tensors import READERS as TENSOR_READERS
from vfx.emit.tensors import read_shards
from vfx.errors import ArgumentError, CheckpointError, CheckpointNote, VfxError, listed
from vfx.extras import needed_for
from vfx.files import check_writable, write_atomic
from vfx.options import ExportOptions, Precision, changed
from vfx.pruning.masks import make_permanent
from vfx.shards import INDEX, files_of, require_weights, weights_in
from vfx.wrappers import plain_model


@checked
def export(
    model: Any,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = DYNAMIC_BATCH,
    origin: Mapping[str, Any] | None = None,
    opset: int = 20,
    precision: Precision = "same",
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    axis_names: Sequence[str] | None = None,
    data: Any = None,
    max_samples: int | None = None,
) -> Path:
    """Write a merged network (a Result or a module with example inputs) in the format of ``path``'s suffix.

    ``.onnx`` is compared with the module in ONNX Runtime at two batch sizes first. ``.safetensors`` holds the state
    dict of a network of the user's own class; a GraphModule goes to ``.pt2``. Masks of ``vfx.prune`` become zeros.
    ``dynamic_shapes``: which sizes vary in ``.onnx`` and ``.pt2``, as for ``vfx.trace``; by default those that the
    capture of a Result left open, and the batch of a module. The metadata of ``.onnx`` and ``.safetensors`` say which
    version wrote them and how a Result was made; ``origin`` adds to that (a command, digests of files).

    For ``.onnx`` alone: ``opset`` (18 or more; from 23 on attention is one node); ``precision="float16"``, or
    ``"int8"`` by ONNX Runtime's quantiser with the ranges that the calibration ``data`` (``max_samples`` of them) show;
    ``input_names``, ``output_names``, and ``axis_names`` of the sizes left open, in their order (default: ``batch``).

    ``.aoti`` is AOTInductor's package: compiled code, which needs a C++ compiler here. A process of its own loads it
    and compares it with the module before it is put in place; ``vfx.load`` refuses it, as it refuses all code, and
    ``torch._inductor.aoti_load_package`` runs it (from an open file).

    >>> vfx.export(merged, "merged.onnx", opset=23, precision="int8", data=images)

    Raises ArgumentError, OutputError (before any work), WeightError, CaptureError, VerificationError; no partial file
    is left.
    """
    path = Path(path)
    options = ExportOptions(
        opset=opset, precision=precision, input_names=input_names, output_names=output_names, axis_names=axis_names,
        data=data, max_samples=max_samples,
    )  # fmt: skip
    check_writable(path, FORMATS)
    check_options(path, options)
    network = model if isinstance(model, nn.Module) else getattr(model, "module", None)
    if not isinstance(network, nn.Module):
        raise ArgumentError(f"export: model must be a network or a Result, got {type(model).__name__}")
    module = plain_model(network, "the network")
    axes = None
    if example_inputs is None and not isinstance(model, nn.Module):
        example_inputs = model.program.example_call
        if dynamic_shapes == DYNAMIC_BATCH:
            dynamic_shapes, axes = captured_shapes(model.program, module), model.program.batch_axes
    check_finite({**dict(module.named_parameters()), **dict(module.named_buffers())}, "the network", masks_of(module))
    network = make_permanent(copy.deepcopy(module)).cpu().eval()
    written = _Written(path, example_inputs, dynamic_shapes, axes, provenance(model, origin), options)
    _WRITERS[path.suffix.lower()](network, written)
    return path


class _Written(NamedTuple):
    """Where and how a network is written."""

    path: Path
    example_inputs: Any
    shapes: Any
    axes: Sequence[int | None] | None  # where samples stand, for each tensor
    metadata: dict[str, str]
    options: ExportOptions


def check_options(path: Path, options: ExportOptions) -> None:
    """Raise ArgumentError for options that a file of this suffix has not, and for int8 without data."""
    given = [f"{name}=" for name in changed(options)]
    if given and path.suffix.lower() != ".onnx":
        raise ArgumentError(f"{path.name}: {listed(given)} is for .onnx files only")
    if options.precision == "int8" and options.data is None:
        raise ArgumentError("int8 is calibrated: give inputs of the network as data=, some hundred samples")
    if options.precision != "int8" and options.data is not None:
        raise ArgumentError(f"data= calibrates int8; precision={options.precision!r} reads none")


def _write_onnx(module: nn.Module, to: _Written) -> None:
    from vfx.emit.onnx import export_onnx  # needs packages of the extra "onnx"

    call = _examples(module, to.example_inputs, "ONNX", to.shapes)
    export_onnx(
        module, to.path, call, dynamic_shapes=to.shapes, axes=to.axes, metadata=to.metadata, options=to.options
    )  # fmt: skip


def _write_safetensors(module: nn.Module, to: _Written) -> None:
    if isinstance(module, fx.GraphModule):
        raise no_class(to.path, "a GraphModule")
    write_atomic(to.path, safetensors_of(module.state_dict(), to.metadata))


def safetensors_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A .safetensors file of tensors, which may share storage. Raises ArgumentError for a dtype that it cannot hold."""
    try:
        # "format" is what transformers asks for
        return _in_order(save_tensors(_unshared(tensors), {"format": "pt", **metadata}))
    except KeyError as error:  # what safetensors says of a dtype that it does not know
        raise ArgumentError(f"a .safetensors file cannot hold {error.args[0]}; cast the network or use .pt2") from error


def _in_order(data: bytes) -> bytes:
    """A .safetensors file whose header has its entries in one order: the library shuffles the metadata's."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def _write_pt2(module: nn.Module, to: _Written) -> None:
    program, _ = exported(module, _examples(module, to.example_inputs, ".pt2", to.shapes), to.shapes)
    write_atomic(to.path, write_program(program))


def _write_aoti(module: nn.Module, to: _Written) -> None:
    from vfx.emit.aoti import write_package  # torch's compiler takes its time to be imported

    write_package(
        module, to.path, _examples(module, to.example_inputs, ".aoti", to.shapes), to.shapes, to.axes, to.metadata
    )


def no_class(path: Path, what: str) -> ArgumentError:
    """The refusal of a state dict where no constructor would give the network that it belongs to."""
    return ArgumentError(f"{path.name}: {what} has no class to load a state dict into; export it to .pt2 or .onnx")


_WRITERS = {".onnx": _write_onnx, ".safetensors": _write_safetensors, ".pt2": _write_pt2, ".aoti": _write_aoti}
FORMATS = tuple(_WRITERS)  # suffixes


@checked
def load(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    model: nn.Module | None = None,
    *,
    entry: str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Read a checkpoint, or a list of several, without running code from it.

    ``.safetensors`` and what ``torch.save`` wrote (``.pt``, ``.pth``, ``.ckpt``, ``.bin``, ``.pth.tar``) give a state
    dict, or a copy of ``model`` that holds it, as do the index (``.index.json``) of one in several files and a Hugging
    Face directory; ``.pt2`` gives a GraphModule; ``.onnx`` gives the checked ONNX model. An exported program (``.pt2``)
    is taken as plain data: pickled objects and compiled libraries in it are refused.

    Training code wraps state dicts. Of those in a file the first that fits ``model`` is taken: trained weights
    (``state_dict``, ``model_state_dict``, ``model``, ``net`` …) before their averages (``state_dict_ema``, ``ema`` …)
    before other entries, of which only one may fit; ``entry`` names another one, or how its tensors' names begin
    (``"teacher."``). Names lose ``module.``, ``_orig_mod.``, ``model.`` and the like where that gives the model's
    names. Narrower floating types are cast to the model's; ``dtype`` is the type that model and tensors get instead. A
    CheckpointNote, which is a warning, says what was chosen, stripped or cast.

    Raises CheckpointError for a file that is missing, damaged, something else, or needs code; ArchitectureError where
    the tensors do not fit; WeightError for NaN and infinities.

    >>> network = vfx.load("last.ckpt", resnet18(), entry="ema")
    >>> merged = vfx.merge(vfx.load(["a.pth", "b.pth"], resnet18()), images, data=loader)
    """
    if not isinstance(path, (str, os.PathLike)):
        return [_load(Path(file), model, entry, dtype) for file in path]
    return _load(Path(path), model, entry, dtype)


def _load(path: Path, model: nn.Module | None, entry: str | None, dtype: torch.dtype | None) -> Any:
    path, notes = weights_in(path), list[str]()
    suffix = path.suffix.lower()
    if dtype is not None and not dtype.is_floating_point:
        raise ArgumentError(f"dtype must be a floating type, such as torch.float32, got {dtype!r}")
    sharded = path.name.endswith(INDEX)
    if not sharded and suffix not in _READERS and path.is_file():
        raise CheckpointError(f"cannot read {path.suffix or 'a file without suffix'}; known: {', '.join(_READERS)}")
    require_weights(path)
    value = (read_shards if sharded else _READERS[suffix])(path)
    if not sharded and suffix not in TENSOR_READERS:
        return value
    tensors = choose(value, path.name, notes, entry, model)
    check_storage(tensors, path.name)
    check_held(tensors, sum(file.stat().st_size for file in files_of(path)), path.name)
    if model is None:
        result: Any = in_dtype(tensors, dtype)
        check_finite(result, path.name)
    else:
        result = filled(model, tensors, path.name, notes, dtype)
        check_finite(result.state_dict(), path.name, masks_of(result))
    for text in notes:
        warnings.warn(text, CheckpointNote, stacklevel=4)  # behind the check of the arguments
    return result


def _read_pt2(path: Path) -> nn.Module:
    program = read_program(path, path.name)
    args, kwargs = program.example_inputs or ((), {})
    try:
        return graph_module(capture(program, Call(tuple(args), dict(kwargs))))
    except VfxError:
        raise
    except Exception as error:  # a graph whose parts do not fit each other fails anywhere
        raise CheckpointError(f"{path.name} holds a damaged graph: {type(error).__name__}: {error}") from error


def _read_onnx(path: Path) -> Any:
    with needed_for("reading .onnx"):
        import onnx
    from vfx.emit.onnx_files import read_weights

    try:
        model = onnx.load(str(path), load_external_data=False)
        onnx.checker.check_model(str(path))  # by its path: weights may lie beside it
        read_weights(model, path.parent)
    except Exception as error:  # protobuf's DecodeError is not public
        raise CheckpointError(f"{path} is not a valid ONNX model: {error}") from error
    return model


def _refuse_aoti(path: Path) -> Any:
    raise CheckpointError(
        f"{path.name} carries compiled code, which vfx.load does not run; load the network's .pt2, or, where you trust "
        "the file, torch._inductor.aoti_load_package"
    )


_READERS = {
    **TENSOR_READERS,
    ".pt2": _read_pt2,
    ".onnx": _read_onnx,
    ".aoti": _refuse_aoti,
}


def _examples(module: nn.Module, example_inputs: Any, what: str, shapes: Any) -> Call:
    if example_inputs is None:
        raise ArgumentError(f"{what} export of a module needs example_inputs")
    call = in_order(module.forward, as_call(example_inputs), type(module).__name__)
    call = batched_call(call) if shapes == DYNAMIC_BATCH else call
    return call.map(lambda x: x.cpu() if isinstance(x, Tensor) else x)


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no storage, as safetensors wants them."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}

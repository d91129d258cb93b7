"""Directories that hold a network and can be loaded again: ``vfx.save_pretrained`` and ``vfx.from_pretrained``.

``model.safetensors`` holds the tensors of the user's class, ``config.json`` what differs from what its constructor
builds: the shapes, and the sizes that modules keep as attributes. ``check.safetensors`` holds inputs and the outputs
that belong to them, which a loaded network must give: another class of the same shapes is noticed. A network that is
no class of the user's (branches of PFM) is kept as ``model.pt2``. ``config.json`` is written last. Reading runs no code
but the constructor that the caller names.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from vfx import __version__
from vfx.address import address
from vfx.arguments import checked
from vfx.capture.outputs import named_tensors
from vfx.emit.files import export, load, safetensors_of
from vfx.emit.own_class import own_tensors
from vfx.emit.own_config import config_changes, has_config, put_config
from vfx.emit.provenance import provenance
from vfx.emit.sharding import read_tensors, write_tensors
from vfx.emit.tensors import read_safetensors
from vfx.errors import ArchitectureError, ArgumentError, CheckpointError, VerificationError
from vfx.files import check_writable, make_folder, write_atomic
from vfx.models.named import build
from vfx.program import Program
from vfx.proof import error_to_size
from vfx.pruning.masks import make_permanent
from vfx.reading import require_file

CONFIG, TENSORS, PROGRAM, CHECK = "config.json", "model.safetensors", "model.pt2", "check.safetensors"
BUILT_IN = ("torchvision", "timm", "vfx")  # constructors that a file may name; the user's own code it may not
SAMPLES = 2
CLOSE = 1e-3  # of the largest output, between machines and versions of torch


@checked
def save_pretrained(
    result: Any,
    path: str | os.PathLike[str],
    *,
    model: str | None = None,
    origin: Mapping[str, Any] | None = None,
    shard_size: int | None = None,
) -> Path:
    """Write a Result into the directory ``path`` so that ``from_pretrained`` gives the network back.

    ``model``: the constructor by name (``"torchvision:resnet18"``), so that it need not be given again. ``origin``:
    as for ``vfx.export``. ``shard_size``: weights of more bytes go to several files of at most so many, and an index,
    as Hugging Face writes them; a larger tensor has a file of its own. Raises ArgumentError, OutputError.

    >>> vfx.save_pretrained(vfx.prune_structured(net, x, sparsity=0.5, data=loader), "small")
    """
    folder = Path(path)
    program = getattr(result, "program", None)
    if not isinstance(getattr(result, "module", None), nn.Module) or not isinstance(program, Program):
        raise ArgumentError(f"save_pretrained: result must be a Result, got {type(result).__name__}")
    if shard_size is not None and shard_size < 1:
        raise ArgumentError(f"save_pretrained: shard_size must be at least one byte, got {shard_size}")
    if shard_size is not None and isinstance(result.module, fx.GraphModule):
        raise ArgumentError("save_pretrained: shard_size= is for a network of the user's class; this one is a program")
    make_folder(folder)
    check_writable(folder / CONFIG)
    facts = json.loads(next(iter(provenance(result, origin).values())))
    config: dict[str, Any] = {"format": "vfx", "version": __version__, "provenance": facts, "model": model}
    if isinstance(result.module, fx.GraphModule):
        export(result, folder / PROGRAM, origin=origin)
        config |= {"holds": "program"}
    else:
        module = make_permanent(copy.deepcopy(result.module)).cpu().eval()
        config |= {"holds": "class", "class": _name(module), **_differences(program.module, module)}
        write_tensors(folder / TENSORS, _kept(module, program.module), provenance(result, origin), shard_size)
        write_atomic(folder / CHECK, safetensors_of(_probe(module, program), {}))
    write_atomic(folder / CONFIG, json.dumps(config, indent=1, sort_keys=True, default=str) + "\n")
    return folder


@checked
def from_pretrained(
    path: str | os.PathLike[str], model: nn.Module | Callable[..., Any] | str | None = None
) -> nn.Module:
    """The network that ``save_pretrained`` wrote to the directory ``path``, in evaluation mode.

    ``model``: what builds the network as it was before (a constructor without arguments, a network, which is copied, or
    a name as on the command line); its layers are resized to the shapes in the file. Not needed where the network was
    kept as a program or with the name of its constructor. Raises CheckpointError for a directory that is none,
    ArchitectureError that names the layer whose shape is not what was resized, VerificationError for a network that
    does not give the outputs it gave when it was saved.

    >>> small = vfx.from_pretrained("small", model=resnet18)
    """
    folder = Path(path)
    config = _read_config(folder)
    if config.get("holds") == "program":
        return load(folder / PROGRAM)
    module = _built(model if model is not None else _named(config, folder))
    _apply_sizes(module, config, folder)
    tensors = read_tensors(folder / TENSORS)
    _fill(module, tensors, config, folder)
    _verify(module, folder)
    return module


def _differences(before: nn.Module | None, after: nn.Module) -> dict[str, Any]:
    """Shapes and sizes that differ from what the constructor builds."""
    if before is None:
        return {"resized": {}, "sizes": {}}
    old = own_tensors(before)
    shapes = {
        name: [list(old[name].shape), list(tensor.shape)]
        for name, tensor in own_tensors(after).items()
        if name in old and old[name].shape != tensor.shape
    }
    modules = dict(before.named_modules())
    sizes: dict[str, dict[str, Any]] = {}
    for path, module in after.named_modules():
        for name, value in vars(module).items():
            old_value = getattr(modules.get(path), name, value)
            if _is_size(value) and _is_size(old_value) and value != old_value and name != "training":
                sizes.setdefault(path, {})[name] = value
    said = {".".join(place): value for place, value in config_changes(before, after).items()}
    return {"resized": shapes, "sizes": sizes, "configuration": said}


def _is_size(value: Any) -> bool:
    """A number, or several in a list or tuple."""
    if isinstance(value, (list, tuple)):
        return all(isinstance(size, (int, float)) for size in value)
    return isinstance(value, (int, float))


def _kept(module: nn.Module, before: nn.Module | None) -> dict[str, Tensor]:
    """The state dict, and buffers outside it that the constructor would not give."""
    state, old = dict(module.state_dict()), {} if before is None else own_tensors(before)
    changed = {
        name: tensor
        for name, tensor in module.named_buffers()
        if name not in state and name in old and not torch.equal(old[name].cpu(), tensor)
    }
    return state | changed


@torch.no_grad()
def _probe(module: nn.Module, program: Program) -> dict[str, Tensor]:
    """A few inputs and the outputs that they give."""
    call = program.with_samples(SAMPLES).example_call.map(lambda x: x.cpu() if isinstance(x, Tensor) else x)
    outputs = {f"output{path}": x for path, x in named_tensors(module(*call.args, **call.kwargs)).items()}
    if not outputs or not all(isinstance(x, Tensor) for x in (*call.args, *call.kwargs.values())):
        return {}  # nested arguments are not kept
    positional = {f"input.{index}": x for index, x in enumerate(call.args)}
    return positional | {f"keyword.{name}": x for name, x in call.kwargs.items()} | outputs


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


# reading --------------------------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not folder.is_dir() or not file.is_file():
        raise CheckpointError(f"{folder} is no directory that save_pretrained wrote: it has no {CONFIG}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(config, dict) or config.get("format") != "vfx":
        raise CheckpointError(f"{file} was not written by save_pretrained")
    return config


def _named(config: Mapping[str, Any], folder: Path) -> str:
    """The constructor that the directory names, if it is one that a file may name."""
    name = config.get("model")
    if isinstance(name, str):
        place = address(name)
        plain = all(isinstance(value, (int, float)) for value in place.options.values())  # no paths, no addresses
        if place.name in BUILT_IN and plain:
            return name
    asked = f", such as model={name!r} in which it was saved" if isinstance(name, str) else ""
    raise ArgumentError(f"{folder} holds tensors of {config.get('class')}; give model=, which builds it{asked}")


def _built(model: nn.Module | Callable[..., Any] | str) -> nn.Module:
    if isinstance(model, str):
        return build(model)
    network = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
    if not isinstance(network, nn.Module):
        raise ArgumentError(f"model= gave {type(network).__name__}, not a torch.nn.Module")
    return network.eval()


def _apply_sizes(module: nn.Module, config: Mapping[str, Any], folder: Path) -> None:
    """Bring the numbers that modules keep beside their tensors to those of the saved network."""
    modules = dict(module.named_modules())
    for path, sizes in config.get("sizes", {}).items():
        for name, value in sizes.items():
            old = getattr(modules.get(path), name, None)
            if not (_is_size(old) and _is_size(value)) or isinstance(old, (list, tuple)) != isinstance(value, list):
                raise ArchitectureError(f"{folder}: {path or 'the network'} has no size {name!r}; {_other(config)}")
            setattr(modules[path], name, type(old)(value) if isinstance(old, (list, tuple)) else value)
    said = {tuple(place.split(".")): value for place, value in config.get("configuration", {}).items()}
    if said and (not has_config(module) or not all(type(value) is int for value in said.values())):
        raise ArchitectureError(f"{folder}: the network has no configuration; {_other(config)}")
    put_config(module, said)


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> None:
    """Put the tensors in, each where the constructor's has the shape that it was resized from."""
    tensors_built, changes = own_tensors(module), config.get("resized", {})
    missing = next((name for name in module.state_dict() if name not in tensors), None)
    extra = next((name for name in tensors if name not in tensors_built), None)
    if missing or extra:
        what = f"lacks {missing!r}" if missing else f"holds {extra!r}, which the model has not"
        raise ArchitectureError(f"{folder / TENSORS} {what}; {_other(config)}")
    for name, built in tensors_built.items():
        tensor = tensors.get(name, built)  # a buffer outside the state dict is the constructor's
        old, new = changes.get(name, [list(tensor.shape)] * 2)
        if list(built.shape) != old or list(tensor.shape) != new:
            raise ArchitectureError(
                f"{name!r} has shape {tuple(built.shape)} in the model and {tuple(tensor.shape)} in {folder}, where it "
                f"came from {tuple(old)}; {_other(config)}"
            )
    for name, tensor in tensors.items():
        tensors_built[name].data = tensor.clone()


def _other(config: Mapping[str, Any]) -> str:
    return f"build {config.get('class')} with the arguments that it had before"


@torch.no_grad()
def _verify(module: nn.Module, folder: Path) -> None:
    """Raise VerificationError unless the network gives the outputs that it gave when it was saved."""
    require_file(folder / CHECK, CheckpointError)
    held = read_safetensors(folder / CHECK)
    expected = {name.removeprefix("output"): x for name, x in held.items() if name.startswith("output")}
    if not expected:
        return
    args = [held[f"input.{index}"] for index in range(sum(name.startswith("input.") for name in held))]
    kwargs = {name.removeprefix("keyword."): x for name, x in held.items() if name.startswith("keyword.")}
    try:
        outputs = named_tensors(module(*args, **kwargs))
    except Exception as error:  # the user's forward raises any class
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        raise VerificationError(f"{folder}: the network does not run at the saved sizes: {cause}") from error
    gaps = [error_to_size(x, outputs[path]) for path, x in expected.items() if path in outputs]
    if len(gaps) < max(len(expected), len(outputs)) or not max(gaps) <= CLOSE:
        raise VerificationError(
            f"{folder}: the network does not give the outputs that it gave when it was saved (relative "
            f"differences {gaps}); is model= the class that it was saved from?"
        )

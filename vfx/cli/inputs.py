"""What the command line's texts stand for: networks, samples, data, choices; and the results written."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vfx.errors import ArgumentError, VfxError
from vfx.files import check_writable, write_atomic
from vfx.normalize.catalogue import Normalization
from vfx.signature import Call


def check_outputs(out: list[Path] | None, *others: Path | None, rebuilt: str = "") -> None:
    """Raise, before any work, unless every network (``out``) and every other file can be written to a place of its own.

    ``rebuilt``: what makes the network one that no class of the user's has, and so no .safetensors file.
    """
    from vfx.emit.files import FORMATS, no_class

    paths = [*(out or ()), *(path for path in others if path is not None)]
    for index, path in enumerate(paths):
        check_writable(path, FORMATS if index < len(out or ()) else ())
        if path.suffix.lower() == ".safetensors" and rebuilt:
            raise no_class(path, rebuilt)
        if path.resolve() in [one.resolve() for one in paths[:index]]:
            raise ArgumentError(f"{path} is named twice among the files to write")


def finish(result: Any, out: list[Path] | None, report: Path | None) -> None:
    """Print the report and write all that can be written; what cannot is said at the end."""
    from vfx.emit.files import export as write

    print(result.report)
    failures: list[VfxError] = []
    for path in out or ():
        try:
            print(f"wrote {write(result, path)}")
        except VfxError as error:
            failures.append(error)
    if report is not None:
        write_atomic(report, result.report.to_json())
        print(f"wrote {report}")
    if failures:
        raise type(failures[0])("; ".join(str(error) for error in failures))


def cut_of(text: str) -> int | str:
    """A number of layers, or a module's name."""
    return int(text) if text.lstrip("-").isdigit() else text


def construct(model: str, arguments: list[str]) -> nn.Module:
    """Call the constructor that the user names."""
    module, separator, name = model.partition(":")
    if not separator:
        raise ArgumentError(f"--model {model!r} must be module:name, e.g. vfx.models:vgg16")
    try:
        constructor = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ArgumentError(f"--model {model!r} cannot be imported: {error}") from error
    network = constructor(**dict(argument(text) for text in arguments))
    if not isinstance(network, nn.Module):
        raise ArgumentError(f"--model {model!r} gave {type(network).__name__}, not a torch.nn.Module")
    return network


def argument(text: str, option: str = "--arg") -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise ArgumentError(f"{option} {text!r} must be key=value")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def load_network(path: Path) -> nn.Module:
    from vfx.emit.files import load

    return load(path)


def load_all(paths: list[Path], model: str, arguments: list[str], entry: str | None = None) -> list[nn.Module]:
    from vfx.emit.files import load

    return [load(path, construct(model, arguments), entry=entry) for path in paths]


def examples_of(texts: list[str]) -> Call:
    """The call of forward that ``--input`` describes, with random values."""
    generator = torch.Generator().manual_seed(0)
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    for text in texts:
        name, separator, rest = text.rpartition("=")
        if separator:
            kwargs[name] = _example(rest, generator)
        else:
            args.append(_example(text, generator))
    return Call(tuple(args), kwargs)


def _example(text: str, generator: torch.Generator) -> Tensor:
    """Two samples of a shape: normal numbers, integers below a bound (``16:1000``) or ones (``16:ones``)."""
    shape, _, kind = text.lower().partition(":")
    try:
        size = (2, *(int(part) for part in shape.split("x") if shape))
        if kind == "ones":
            return torch.ones(size, dtype=torch.long)
        return torch.randint(int(kind), size, generator=generator) if kind else torch.randn(size, generator=generator)
    except (ValueError, RuntimeError) as error:
        raise ArgumentError(
            "--input takes the shape of one sample, e.g. 3x32x32, with name= for keyword arguments and :1000 for "
            f"integers below 1000 (:ones for ones), e.g. input_ids=16:1000; got {text!r}"
        ) from error


def data_of(source: str | None, inputs: Call, model: str = "", part: str = "train") -> Any:
    """Batches of what ``source`` names, labels behind the inputs where it has any; None for none."""
    from vfx.data.catalogue import read

    return None if source is None else read(source, part=part, example_inputs=inputs, model=model)


def normalization_of(method: str, layers: list[str] | None, memory_limit: int | None, **options: Any) -> Any:
    """The normalization that the options describe; numbers among the layers are numbers."""
    if optional(method) is None:
        return None
    chosen = [int(one) if one.isdigit() else one for one in layers] if layers else None
    return Normalization(method, chosen, memory_limit=memory_limit, **options)


def grid_of(texts: list[str] | None) -> dict[str, list[Any]] | None:
    """``name=value,value`` for each option of a grid; values are numbers or names ("none" is None)."""
    if not texts:
        return None
    found: dict[str, list[Any]] = {}
    for text in texts:
        name, separator, values = text.partition("=")
        if not (separator and values):
            raise ArgumentError(f"--grid: {text!r} is no name=value,value")
        parts = [argument(f"{name}={value}", "--grid")[1] for value in values.split(",")]
        found[name] = [optional(part) if isinstance(part, str) else part for part in parts]
    return found


def budget_of(text: str | None) -> dict[str, float] | None:
    """``name=share`` as a budget; raises ArgumentError."""
    if text is None:
        return None
    name, value = argument(text, "--budget")
    if not isinstance(value, (int, float)):
        raise ArgumentError(f"--budget: {text!r} is no name=share, such as flops=0.5")
    return {name: float(value)}


def match_of(match: str, count: int | None, data: str | None) -> Any:
    from vfx.match.first_layers import FirstLayers

    if count is None or optional(match) is None:
        return optional(match)
    return FirstLayers(match if match != "auto" else "activation" if data else "weight", count)


def sparsity_of(texts: list[str] | None) -> float | dict[str, float] | None:
    """One share, or a share for each glob."""
    if not texts:
        return None
    try:
        pairs = [text.rpartition("=") for text in texts]
        if len(texts) == 1 and not pairs[0][1]:
            return float(texts[0])
        return {pattern or "*": float(share) for pattern, _, share in pairs}
    except ValueError as error:
        raise ArgumentError(f"--sparsity takes 0.9, or glob=0.9 for layers; got {', '.join(texts)}") from error


def optional(name: str) -> str | None:
    return None if name.lower() == "none" else name


def floats(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ArgumentError(f"--weights takes numbers, e.g. 0.3,0.7, got {text!r}") from error

"""What the command line's texts stand for: networks, samples, data and choices.

Nothing heavy is imported before a command runs: a wrong option is answered at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfx.address import option
from vfx.cli.early import check_network
from vfx.errors import ArgumentError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from vfx.capture.signature import Call


def cut_of(text: str) -> int | str:
    """A number of layers, or a module's name."""
    return int(text) if text.lstrip("-").isdigit() else text


def construct(model: str, arguments: list[str]) -> nn.Module:
    """The network that ``--model`` names, built with the options of ``--arg``."""
    from vfx.models.named import build

    return build(model, dict(option(text, "--arg") for text in arguments))


def load_network(path: Path) -> nn.Module:
    from vfx.emit.files import load

    return load(path)


def load_all(
    paths: list[Path], model: str | Sequence[str], arguments: list[str], entry: str | None = None
) -> list[nn.Module]:
    """A network for each checkpoint, by one ``model`` or each by its own; of a directory the file of weights in it."""
    from vfx.emit.files import load

    models = [model] if isinstance(model, str) else list(model)
    built = models * len(paths) if len(models) == 1 else models
    return [load(path, construct(constructor, arguments), entry=entry) for path, constructor in zip(paths, built)]


def examples_of(texts: list[str], model: str = "") -> Call:
    """The call of forward that ``--input`` describes, with random values; without it what ``model`` usually takes."""
    import torch

    from vfx.capture.signature import Call

    check_network(None, (), texts)
    if not texts:
        from vfx.models.named import usual_inputs

        texts = usual_inputs(model)
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
    import torch

    shape, _, kind = text.lower().partition(":")
    try:
        size = (2, *(int(part) for part in shape.split("x") if shape))
        if kind == "ones":
            return torch.ones(size, dtype=torch.long)
        return torch.randint(int(kind), size, generator=generator) if kind else torch.randn(size, generator=generator)
    except RuntimeError as error:
        raise ArgumentError(f"--input {text!r} cannot be made: {str(error).splitlines()[0]}") from error


def required(source: str | None) -> str:
    """The data that a command cannot do without. Raises ArgumentError."""
    if source is None:
        raise ArgumentError(
            "--data is missing: the networks are measured on inputs, e.g. -d folder:photos or -d digits"
        )
    return source


def data_of(source: str | None, inputs: Call | None, model: str = "", part: str = "train") -> Any:
    """Batches of what ``source`` names, labels behind the inputs where it has any; None for none."""
    from vfx.data.catalogue import read

    return None if source is None else read(source, part=part, example_inputs=inputs, model=model)


def normalization_of(method: str, layers: list[str] | None, memory_limit: int | None, **options: Any) -> Any:
    """The normalization that the options describe; numbers among the layers are numbers."""
    from vfx.normalize.catalogue import Normalization

    if optional(method) is None:
        return None
    chosen = [int(layer) if layer.isdigit() else layer for layer in layers] if layers else None
    return Normalization(method, chosen, memory_limit=memory_limit, **options)


def grid_of(texts: list[str] | None) -> dict[str, list[Any]] | None:
    """``name=value,value`` for each option of a grid; values are numbers or names ("none" is None)."""
    if not texts:
        return None
    values_of: dict[str, list[Any]] = {}
    for text in texts:
        name, separator, values = text.partition("=")
        if not (separator and values):
            raise ArgumentError(f"--grid: {text!r} is no name=value,value")
        parts = [option(f"{name}={value}", "--grid")[1] for value in values.split(",")]
        values_of[name] = [optional(part) if isinstance(part, str) else part for part in parts]
    return values_of


def option_values(texts: list[str] | None) -> dict[str, Any]:
    """``name=value`` for options of merge or prune; "none" is None."""
    pairs = [option(text, "--set") for text in texts or ()]
    return {name: optional(value) if isinstance(value, str) else value for name, value in pairs}


def budget_of(text: str | None) -> dict[str, float] | None:
    """``name=share`` as a budget; raises ArgumentError."""
    if text is None:
        return None
    name, value = option(text, "--budget")
    if not isinstance(value, (int, float)):
        raise ArgumentError(f"--budget: {text!r} is no name=share, such as flops=0.5")
    return {name: float(value)}


def match_of(match: str, count: int | None, data: str | None, options: list[str]) -> Any:
    """What ``--match``, ``--match-layers`` and ``--match-arg`` ask for: a name, None or a matcher with its options."""
    if optional(match) is None or (count is None and not options):
        return optional(match)
    from vfx.match.catalogue import matcher_named
    from vfx.match.first_layers import FirstLayers

    name = match if match != "auto" else "activation" if data else "weight"
    matcher = matcher_named(name, **dict(option(text, "--match-arg") for text in options))
    return matcher if count is None else FirstLayers(matcher, count)


def combine_of(combine: str, options: list[str]) -> Any:
    """What ``--combine`` and ``--combine-arg`` ask for: a name, or a combiner with its options."""
    if not options:
        return combine
    from vfx.combine.catalogue import AVERAGE, combiner_named

    if combine == AVERAGE:
        raise ArgumentError(f"--combine-arg: {combine!r} takes no options; name a method by --combine")
    return combiner_named(combine, **dict(option(text, "--combine-arg") for text in options))


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


def widths_of(text: str | None) -> float | list[float] | None:
    """One share, or several; raises ArgumentError."""
    try:
        shares = [float(part) for part in text.split(",")] if text is not None else []
    except ValueError as error:
        raise ArgumentError(f"--sparsity takes a share such as 0.5, or several as in 0.25,0.5; got {text!r}") from error
    return shares if len(shares) > 1 else shares[0] if shares else None


def optional(name: str) -> str | None:
    return None if name.lower() == "none" else name


def floats(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ArgumentError(f"--weights takes numbers, e.g. 0.3,0.7, got {text!r}") from error

"""The command line: the names and options of the Python API."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from vfx.errors import ArgumentError, VfxError
from vfx.signature import Call

app = typer.Typer(
    help="Merge and prune trained networks without retraining.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str, typer.Option("--model", "-m", help="Constructor as module:name, e.g. torchvision.models:resnet18.")
]
Arguments = Annotated[
    list[str], typer.Option("--arg", "-a", help="Constructor argument key=value (value in JSON), repeatable.")
]
Inputs = Annotated[
    list[str],
    typer.Option(
        "--input",
        "-i",
        help="Shape of one sample, e.g. 3x224x224; name=16:1000 is a keyword argument of integers below 1000 "
        "(name=16:ones of ones). Repeatable.",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        "-d",
        help="Calibration inputs: .npz, .npy, .safetensors or .pt file (arrays by the names of keyword arguments), or "
        "'digits'.",
    ),
]
Out = Annotated[list[Path] | None, typer.Option("--out", "-o", help="Result: .onnx, .safetensors or .pt2; repeatable.")]
Normalize = Annotated[
    str,
    typer.Option(
        help="auto, none, repair, rescale, rescale_average, reshift, reset, bias_calibration, bias_removal or "
        "rescale_weights."
    ),
]
Chosen = Annotated[
    list[str] | None,
    typer.Option("--layers", help="Layers to normalise: numbers, names or globs, repeatable; default: all but heads."),
]
Site = Annotated[str, typer.Option(help="Normalise before or behind the activation: preactivation or activation.")]
Sweep = Annotated[
    str, typer.Option(help="Statistics of the merged network: exact (layer by layer), train, uncorrected or batch.")
]
Memory = Annotated[
    int | None, typer.Option(help="Bytes of activations an exact sweep keeps in memory; the rest waits on disk.")
]
Match = Annotated[str, typer.Option(help="auto, none, weight, activation, c2m3, iterated or ste.")]
Samples = Annotated[int | None, typer.Option(help="Use at most this many calibration samples.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps, …")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the report as JSON.")]


def main() -> None:
    """Entry point: vfx's own errors end with a message, not a traceback."""
    try:
        app()
    except VfxError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]{type(error).__name__}:[/] ", end="")
        Console(stderr=True, soft_wrap=True, markup=False).print(str(error))
        sys.exit(1)


@app.command()
def merge(
    checkpoints: Annotated[list[Path], typer.Argument(help="Two or more state dicts: .safetensors, .pt or .pth.")],
    model: Model,
    inputs: Inputs,
    arguments: Arguments = [],  # noqa: B006
    data: Data = None,
    match: Match = "auto",
    restarts: Annotated[int, typer.Option(help="Further runs of weight, c2m3 or ste from random permutations.")] = 0,
    normalize: Normalize = "auto",
    preserve: Annotated[str, typer.Option(help="First layers kept for each edge: a number, or a module's name.")] = "0",
    join: Annotated[str, typer.Option(help="preactivation or activation.")] = "preactivation",
    heads: Annotated[str, typer.Option(help="Last layers kept for each edge: a number, or a module's name.")] = "0",
    head_output: Annotated[str, typer.Option(help="Outputs of the heads: list, cat or mean.")] = "list",
    layers: Chosen = None,
    site: Site = "preactivation",
    sweep: Sweep = "exact",
    bias_count: Annotated[int | None, typer.Option(help="Layers of bias removal; default: chosen on the data.")] = None,
    bias_direction: Annotated[str | None, typer.Option(help="backward or forward; default: chosen.")] = None,
    memory_limit: Memory = None,
    match_layers: Annotated[int | None, typer.Option(help="Align only what the first layers produce.")] = None,
    prepare: Annotated[str, typer.Option(help="none, or remove_bias: match edges without their biases.")] = "none",
    references: Annotated[
        list[Path] | None, typer.Option("--reference", help="Networks whose statistics are the goal, repeatable.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="One weight for each edge, e.g. 0.3,0.7.")] = None,
    max_samples: Samples = None,
    verify: Annotated[bool, typer.Option(help="Prove that each permutation preserves the function.")] = True,
    seed: Seed = 0,
    device: Device = None,
    out: Out = None,
    report: Json = None,
) -> None:
    """Merge two or more checkpoints of one architecture into one network."""
    from vfx import api

    edges, examples = _load_all(checkpoints, model, arguments), _examples(inputs)
    asked = {"site": site, "sweep": sweep, "count": bias_count, "direction": bias_direction}
    result = api.merge(
        edges,
        examples,
        data=_data(data, examples, labels=True),
        match=_match(match, match_layers, data),
        restarts=restarts,
        normalize=_normalization(normalize, layers, memory_limit, **asked),
        prepare=_optional(prepare),
        references=_load_all(references or [], model, arguments),
        preserve=_cut(preserve),
        join=join,  # type: ignore[arg-type]
        heads=_cut(heads),
        head_output=head_output,  # type: ignore[arg-type]
        weights=_floats(weights),
        max_samples=max_samples,
        verify=verify,
        seed=seed,
        device=device,
    )
    _finish(result, out, report)


@app.command()
def repair(
    checkpoint: Annotated[Path, typer.Argument(help="The network to repair.")],
    references: Annotated[list[Path], typer.Argument(help="Networks whose statistics are the goal.")],
    model: Model,
    inputs: Inputs,
    data: Data,
    arguments: Arguments = [],  # noqa: B006
    method: Annotated[str, typer.Option(help="auto, repair, rescale, rescale_average, reshift or reset.")] = "auto",
    layers: Chosen = None,
    site: Site = "preactivation",
    sweep: Sweep = "exact",
    memory_limit: Memory = None,
    match: Annotated[str, typer.Option(help="Align the references first: none, weight or activation.")] = "none",
    max_samples: Samples = None,
    seed: Seed = 0,
    out: Out = None,
    report: Json = None,
) -> None:
    """Bring a network's layer statistics to those of its references."""
    from vfx import api

    network, *others = _load_all([checkpoint, *references], model, arguments)
    examples = _examples(inputs)
    result = api.repair(
        network,
        others,
        examples,
        data=_data(data, examples, labels=True),
        method=_normalization(method, layers, memory_limit, site=site, sweep=sweep) or "none",
        match=_optional(match),
        max_samples=max_samples,
        seed=seed,
    )
    _finish(result, out, report)


@app.command()
def diagnose(
    checkpoint: Annotated[Path, typer.Argument(help="The merged network: a state dict of the model, or .pt2.")],
    references: Annotated[list[Path], typer.Argument(help="State dicts of the edges.")],
    model: Model,
    inputs: Inputs,
    data: Data,
    arguments: Arguments = [],  # noqa: B006
    match: Annotated[str, typer.Option(help="Align the edges first: auto, none, weight or activation.")] = "auto",
    max_samples: Samples = None,
    seed: Seed = 0,
    html: Annotated[Path | None, typer.Option(help="Write one page with figures and table.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the rows as CSV.")] = None,
    report: Json = None,
) -> None:
    """Where a merged network lost its edges' features, and what to try."""
    from vfx.diagnosis.diagnose import diagnose as run

    whole = checkpoint.suffix == ".pt2"
    network = _load(checkpoint) if whole else _load_all([checkpoint], model, arguments)[0]
    examples = _examples(inputs)
    found = run(
        network,
        _load_all(references, model, arguments),
        examples,
        data=_data(data, examples),
        match=_optional(match),
        max_samples=max_samples,
        seed=seed,
    )
    print(found)
    for path, write in ((html, found.to_html), (csv, found.to_csv), (report, found.to_json)):
        if path is not None:
            write(path)
            print(f"wrote {path}")


@app.command()
def barrier(
    checkpoints: Annotated[list[Path], typer.Argument(help="Two state dicts.")],
    model: Model,
    inputs: Inputs,
    data: Data,
    arguments: Arguments = [],  # noqa: B006
    evaluate: Annotated[
        str | None, typer.Option(help="What is measured on, with labels if it has any; like --data.")
    ] = None,
    match: Annotated[str, typer.Option(help="none, weight or activation.")] = "activation",
    normalize: Annotated[str | None, typer.Option(help="Methods, e.g. none,repair,rescale.")] = None,
    points: Annotated[int, typer.Option(help="Values of alpha, both ends among them.")] = 11,
    max_samples: Samples = None,
    seed: Seed = 0,
    plot: Annotated[Path | None, typer.Option(help="Write the curves as PNG.")] = None,
    report: Json = None,
) -> None:
    """Accuracy and loss on the line between two networks, before and after alignment and normalization."""
    from vfx.diagnosis.barrier import barrier as run
    from vfx.diagnosis.figures import png
    from vfx.files import write_atomic

    examples = _examples(inputs)
    found = run(
        _load_all(checkpoints, model, arguments),
        examples,
        data=_data(data, examples),
        evaluate=_labelled(evaluate or data, examples),
        match=_optional(match),
        normalize=[_optional(name) for name in normalize.split(",")] if normalize else None,
        points=points,
        max_samples=max_samples,
        seed=seed,
    )
    print(found)
    if plot is not None:
        write_atomic(plot, png(found.figure()))
        print(f"wrote {plot}")
    if report is not None:
        found.to_json(report)
        print(f"wrote {report}")


@app.command()
def prune(
    checkpoint: Annotated[Path, typer.Argument(help="State dict of the network: .safetensors, .pt or .pth.")],
    model: Model,
    inputs: Inputs,
    arguments: Arguments = [],  # noqa: B006
    sparsity: Annotated[
        list[str] | None,
        typer.Option("--sparsity", "-s", help="Share of the weights that go, or glob=share for layers; repeatable."),
    ] = None,
    score: Annotated[str, typer.Option(help="magnitude, random, fisher, woodfisher, wanda or gradient.")] = "magnitude",
    score_arguments: Annotated[
        list[str], typer.Option("--score-arg", help="Option of the score, e.g. block=1000; repeatable.")
    ] = [],  # noqa: B006
    scope: Annotated[str, typer.Option(help="auto, global, layer, row, or a pattern such as 2:4.")] = "auto",
    data: Data = None,
    max_samples: Samples = None,
    repair_samples: Annotated[int, typer.Option(help="Samples that the repair reads.")] = 64,
    protect: Annotated[
        list[str] | None, typer.Option(help="Layers left alone: auto, none, first, head or a glob; repeatable.")
    ] = None,
    normalize: Annotated[str, typer.Option(help="auto, none, repair, rescale or reset.")] = "auto",
    steps: Annotated[int, typer.Option(help="One-shot steps, scores taken anew in each.")] = 1,
    schedule: Annotated[str, typer.Option(help="How the sparsity grows with the steps: cubic or linear.")] = "cubic",
    masks: Annotated[str, typer.Option(help="permanent, parametrize or semi_structured (2:4 on CUDA).")] = "permanent",
    verify: Annotated[bool, typer.Option(help="Check that folding the repair preserves the function.")] = True,
    seed: Seed = 0,
    device: Device = None,
    out: Out = None,
    report: Json = None,
) -> None:
    """Prune a trained network in one shot and repair its statistics."""
    from vfx import api
    from vfx.pruning.scores.catalogue import score_named

    (network,), examples = _load_all([checkpoint], model, arguments), _examples(inputs)
    result = api.prune(
        network,
        examples,
        sparsity=_sparsity(sparsity),
        score=score_named(score, **dict(_argument(text, "--score-arg") for text in score_arguments)),
        scope=scope,
        data=_labelled(data, examples, train=True),
        max_samples=max_samples,
        repair_samples=repair_samples,
        protect="auto" if protect in (None, [], ["auto"]) else [name for name in protect or () if name != "none"],
        normalize=_optional(normalize),
        steps=steps,
        schedule=schedule,
        masks=masks,
        verify=verify,
        seed=seed,
        device=device,
    )
    _finish(result, out, report)


@app.command()
def profile(
    model: Model,
    inputs: Inputs,
    arguments: Arguments = [],  # noqa: B006
    csv: Annotated[Path | None, typer.Option(help="Write the rows as CSV.")] = None,
    report: Json = None,
) -> None:
    """Parameters, MACs, FLOPs and memory of each layer."""
    from vfx import api

    table = api.profile(_construct(model, arguments), _examples(inputs))
    Console().print(str(table), soft_wrap=True, highlight=False, markup=False)
    if csv is not None:
        table.to_csv(csv)
    if report is not None:
        table.to_json(report)


@app.command()
def symmetry(
    model: Model,
    inputs: Inputs,
    arguments: Arguments = [],  # noqa: B006
    verify: Annotated[bool, typer.Option(help="Check the groups numerically in float64.")] = True,
    draw: Annotated[Path | None, typer.Option(help="Picture of the tie graph: .png, .svg or .pdf.")] = None,
    seed: Seed = 0,
) -> None:
    """Permutation symmetries: groups, members, pinned axes."""
    from vfx import api

    found = api.symmetry(_construct(model, arguments), _examples(inputs))
    Console().print(str(found), soft_wrap=True, highlight=False, markup=False)
    if verify:
        print(f"verified: relative error {found.verify(seed):.1e} (float64, random group elements)")
    if draw is not None:
        print(f"wrote {found.draw(draw)}")


@app.command()
def layers(model: Model, inputs: Inputs, arguments: Arguments = []) -> None:  # noqa: B006
    """Numbered conv and linear layers, shortcuts, and the joins of each cut."""
    from vfx import api

    print(api.layers(_construct(model, arguments), _examples(inputs)))


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="State dict of the model, or a .pt2 network.")],
    out: Annotated[list[Path], typer.Option("--out", "-o", help="Result: .onnx, .safetensors or .pt2; repeatable.")],
    inputs: Inputs,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Constructor as module:name.")] = None,
    arguments: Arguments = [],  # noqa: B006
) -> None:
    """Convert a checkpoint to ONNX, .pt2 or safetensors; ONNX is checked in ONNX Runtime."""
    from vfx.emit.files import export as write
    from vfx.emit.files import load

    if model is None and checkpoint.suffix != ".pt2":
        raise ArgumentError(f"{checkpoint.name} holds tensors only; --model says which network they belong to")
    network = load(checkpoint, _construct(model, arguments) if model else None)
    for path in out:
        print(f"wrote {write(network, path, _examples(inputs))}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for edges, table, plot and ONNX model.")] = Path(
        "demo"
    ),
    width: Annotated[float, typer.Option(help="Width multiplier of VGG16.")] = 0.25,
    epochs: Annotated[int, typer.Option(help="Training epochs of each edge.")] = 15,
    retrain: Annotated[bool, typer.Option(help="Train the edges even if an earlier run left them.")] = False,
) -> None:
    """The papers' Table 1 on scikit-learn's digits, offline."""
    from vfx.demo import run

    run(out, width=width, epochs=epochs, retrain=retrain)


def _finish(result: Any, out: list[Path] | None, report: Path | None) -> None:
    from vfx.emit.files import export as write
    from vfx.files import write_atomic

    print(result.report)
    for path in out or ():
        print(f"wrote {write(result, path)}")
    if report is not None:
        write_atomic(report, result.report.to_json().encode())


def _cut(text: str) -> int | str:
    """A number of layers, or a module's name."""
    return int(text) if text.lstrip("-").isdigit() else text


def _construct(model: str, arguments: list[str]) -> nn.Module:
    """Call the constructor that the user names."""
    module, separator, name = model.partition(":")
    if not separator:
        raise ArgumentError(f"--model {model!r} must be module:name, e.g. vfx.models:vgg16")
    try:
        constructor = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ArgumentError(f"--model {model!r} cannot be imported: {error}") from error
    network = constructor(**dict(_argument(text) for text in arguments))
    if not isinstance(network, nn.Module):
        raise ArgumentError(f"--model {model!r} gave {type(network).__name__}, not a torch.nn.Module")
    return network


def _argument(text: str, option: str = "--arg") -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise ArgumentError(f"{option} {text!r} must be key=value")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _load(path: Path) -> nn.Module:
    from vfx.emit.files import load

    return load(path)


def _load_all(paths: list[Path], model: str, arguments: list[str]) -> list[nn.Module]:
    from vfx.emit.files import load

    return [load(path, _construct(model, arguments)) for path in paths]


def _examples(texts: list[str]) -> Call:
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


def _data(source: str | None, inputs: Call, labels: bool = False) -> Any:
    """Calibration inputs: a tensor, or batches by the names of the keyword arguments; with their labels if wanted."""
    if source is None:
        return None
    if source == "digits":
        from vfx.models import digits

        images, classes = digits()[:2]
        return list(zip(images.split(128), classes.split(128))) if labels else images
    from vfx.statistics.files import read_batches, read_inputs, read_labelled

    if inputs.kwargs:
        return read_batches(Path(source), list(inputs.kwargs))
    return read_labelled(Path(source)) if labels else read_inputs(Path(source))


def _normalization(method: str, layers: list[str] | None, memory_limit: int | None, **options: Any) -> Any:
    """The normalization that the options describe; numbers among the layers are numbers."""
    from vfx.normalize.catalogue import Normalization

    if _optional(method) is None:
        return None
    chosen = [int(one) if one.isdigit() else one for one in layers] if layers else None
    return Normalization(method, chosen, memory_limit=memory_limit, **options)


def _match(match: str, count: int | None, data: str | None) -> Any:
    from vfx.match.first_layers import FirstLayers

    if count is None or _optional(match) is None:
        return _optional(match)
    return FirstLayers(match if match != "auto" else "activation" if data else "weight", count)


def _labelled(source: str | None, inputs: Call, train: bool = False) -> Any:
    """Batches with their class labels where the source has them, else as for calibration."""
    if source == "digits":
        from vfx.models import digits

        return [tuple(digits()[:2] if train else digits()[2:])]
    if source is None or inputs.kwargs:
        return _data(source, inputs)
    from vfx.statistics.files import read_labelled

    return read_labelled(Path(source))


def _sparsity(texts: list[str] | None) -> float | dict[str, float] | None:
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


def _optional(name: str) -> str | None:
    return None if name.lower() == "none" else name


def _floats(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ArgumentError(f"--weights takes numbers, e.g. 0.3,0.7, got {text!r}") from error

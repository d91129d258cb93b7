"""``vfx compare``, ``vfx evaluate`` and ``vfx select``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vfx.cli.app import app
from vfx.cli.early import check_models, check_network
from vfx.cli.inputs import cut_of, data_of, examples_of, grid_of, load_all, load_network, option_values, required
from vfx.cli.keywords import option_of
from vfx.cli.options import (
    MODELS,
    Arguments,
    Csv,
    Data,
    Device,
    Draw,
    Entry,
    Inputs,
    Json,
    Models,
    Samples,
    Seed,
)
from vfx.cli.results import check_outputs, picture, put, short_names, tell
from vfx.errors import ArgumentError
from vfx.files import check_writable
from vfx.options import MergeOptions

Evaluate = Annotated[
    list[str] | None,
    typer.Option(
        help="What is measured on, with labels if it has any; like --data (the default). Given once for each "
        "checkpoint: data whose labels are that network's classes."
    ),
]
Resume = Annotated[
    Path | None,
    typer.Option(help="Keep each finished cell in this JSON file, and take those that are there from it."),
]


@app.command()
def compare(
    checkpoints: Annotated[list[Path], typer.Argument(help="Two or more state dicts to merge, or one to prune.")],
    models: Models,
    inputs: Inputs = [],  # noqa: B006
    arguments: Arguments = [],  # noqa: B006
    entry: Entry = None,
    data: Data = None,
    evaluate: Evaluate = None,
    heads: Annotated[str, option_of(MergeOptions, "heads")] = "0",
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", "-g", help="Values to try of an option of merge or prune: preserve=0,4,8; repeatable."),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="An option of merge or prune that all have: match=weight; repeatable."),
    ] = None,
    latency: Annotated[bool, typer.Option(help="Time a batch of each network, too.")] = True,
    max_samples: Samples = None,
    device: Device = None,
    resume: Resume = None,
    draw: Draw = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table as Markdown; - is standard output.")] = None,
    csv: Csv = None,
    report: Json = None,
) -> None:
    """Merge checkpoints (or prune one) in every way of a grid, side by side."""
    check_outputs(None, report, csv, markdown, resume)
    if draw is not None:
        check_writable(draw, (".png",))
    check_models(models, checkpoints)
    model = models[0]
    check_network(model, checkpoints, inputs)
    tried, fixed = grid_of(grid), option_values(options)
    fixed |= {"heads": cut_of(heads)} if heads != "0" else {}
    sources = evaluate or [required(data)]
    _check_sources(sources, checkpoints)
    from vfx import api

    networks, examples = load_all(checkpoints, models, arguments, entry), examples_of(inputs, model)
    comparison = api.compare(
        networks if len(networks) > 1 else networks[0],
        examples,
        data=data_of(data, examples, model),
        evaluate=_measured([data_of(name, examples, model, "test" if evaluate else "train") for name in sources]),
        grid=tried,
        latency=latency,
        max_samples=max_samples,
        device=device,
        resume=resume,
        **fixed,
    )
    _write(comparison, draw, report, csv, markdown)


def _write(comparison: Any, draw: Path | None, *texts: Path | None) -> None:
    tell(comparison, *texts)
    for path, text in zip(texts, (comparison.to_json, comparison.to_csv, comparison.to_markdown)):
        put(path, text, *texts)
    put(draw, lambda: picture(comparison), *texts)


def _check_sources(sources: list[str], checkpoints: list[Path]) -> None:
    if len(sources) not in (1, len(checkpoints)):
        raise ArgumentError(f"--evaluate stands once, or once for each of {len(checkpoints)} checkpoints")


def _measured(data: list[Any]) -> Any:
    """Data of all checkpoints, or those of each one's own classes."""
    from vfx.data.tasks import tasks

    return data[0] if len(data) == 1 else tasks(*data)


@app.command()
def evaluate(
    networks: Annotated[
        list[str],
        typer.Argument(help=f"Checkpoints, or .pt2 and .onnx networks; the model may stand first: {MODELS}."),
    ],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Constructor, as for the other commands.")] = None,
    inputs: Inputs = [],  # noqa: B006
    arguments: Arguments = [],  # noqa: B006
    entry: Entry = None,
    data: Data = None,
    ensemble: Annotated[bool, typer.Option(help="Their ensemble as well, which the agreement is then with.")] = False,
    latency: Annotated[bool, typer.Option(help="Time a batch of each network, too.")] = True,
    max_samples: Samples = None,
    device: Device = None,
    csv: Csv = None,
    report: Json = None,
) -> None:
    """Accuracy, loss, agreement, parameters, FLOPs and time of networks on data."""
    if model is None and not Path(networks[0]).exists() and ":" in networks[0]:
        model, *networks = networks
    if not networks:
        raise ArgumentError("evaluate needs checkpoints behind the model")
    check_outputs(None, csv, report)
    source, files = required(data), [Path(name) for name in networks]
    check_network(model, files, inputs)
    from vfx.diagnosis.evaluation import evaluate as run

    modules = [_network(file, model, arguments, entry) for file in files]
    whole = next((module for module in modules if hasattr(module, "example_call")), None)
    examples = whole.example_call() if whole and not (inputs or model) else examples_of(inputs, model or "")
    evaluation = run(
        modules,
        examples,
        data=data_of(source, examples, model or "", "test"),
        names=short_names(files),
        ensemble=len(modules) if ensemble else 0,
        latency=latency,
        max_samples=max_samples,
        device=device,
    )
    tell(evaluation, csv, report)
    put(csv, evaluation.to_csv, report)
    put(report, evaluation.to_json, csv)


def _network(file: Path, model: str | None, arguments: list[str], entry: str | None) -> Any:
    """The network of a checkpoint, or of a file that holds a whole one."""
    suffix = file.suffix.lower()
    if suffix == ".onnx":
        from vfx.emit.onnx_network import OnnxNetwork

        return OnnxNetwork(file)
    if suffix == ".pt2":
        return load_network(file)
    if model is None:
        raise ArgumentError(f"{file.name} holds tensors only; --model says which network they belong to")
    return load_all([file], model, arguments, entry)[0]


@app.command()
def select(
    data: Annotated[str, typer.Argument(help="What is chosen from; named as for --data of the other commands.")],
    count: Annotated[float, typer.Argument(help="How many samples, or a share below 1.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File of the chosen samples: .npz, to be used as --data.")],
    strategy: Annotated[str, typer.Option(help="random, easy, hard (EL2N of the networks) or balanced.")] = "random",
    checkpoints: Annotated[
        list[Path] | None, typer.Option("--network", "-n", help="Checkpoint whose EL2N counts; repeatable.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Constructor of these networks.")] = None,
    inputs: Inputs = [],  # noqa: B006
    arguments: Arguments = [],  # noqa: B006
    entry: Entry = None,
    pseudo_labels: Annotated[bool, typer.Option(help="Classes as the networks see them, not the labels.")] = False,
    balanced: Annotated[bool, typer.Option(help="Equally many of each class, whatever the strategy.")] = False,
    max_samples: Samples = None,
    seed: Seed = 0,
) -> None:
    """Choose samples to calibrate on: at random, by difficulty, or balanced over classes."""
    check_outputs(None, out)
    if out.suffix.lower() != ".npz":
        raise ArgumentError(f"{out}: the chosen samples are written as .npz")
    from vfx.data.arrays import npz_of
    from vfx.diagnosis.select import select as run

    if checkpoints and model is None:
        raise ArgumentError("--network holds tensors only; --model says which network they belong to")
    examples = examples_of(inputs, model or "") if inputs or model else None
    selection = run(
        data_of(data, examples, model or ""),
        count if 0 < count < 1 else int(count),
        strategy,  # type: ignore[arg-type]
        models=load_all(checkpoints or [], model or "", arguments, entry) or None,
        pseudo_labels=pseudo_labels,
        balanced=balanced,
        max_samples=max_samples,
        seed=seed,
    )
    put(out, lambda: npz_of(selection, selection.indices))
    print(f"{selection.samples:,} samples ({selection.strategy})")

"""``vfx profile``, ``symmetry``, ``layers``, ``export`` and ``demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vfx.cli.app import app
from vfx.cli.early import check_network
from vfx.cli.inputs import construct, data_of, examples_of
from vfx.cli.keywords import Given, values, with_keywords
from vfx.cli.options import Arguments, Csv, Entry, Inputs, Json, Model, Outputs, Seed
from vfx.cli.results import check_outputs, origin_of, put, size_of, tell
from vfx.errors import ArgumentError
from vfx.files import check_writable
from vfx.options import ExportOptions


@app.command()
def profile(
    model: Model,
    inputs: Inputs = [],  # noqa: B006
    arguments: Arguments = [],  # noqa: B006
    csv: Csv = None,
    report: Json = None,
) -> None:
    """Parameters, MACs, FLOPs and memory of each layer."""
    check_outputs(None, csv, report)
    check_network(model, (), inputs)
    from vfx import api

    table = api.profile(construct(model, arguments), examples_of(inputs, model))
    tell(table, csv, report)
    put(csv, table.to_csv, report)
    put(report, table.to_json, csv)


@app.command()
def symmetry(
    model: Model,
    inputs: Inputs = [],  # noqa: B006
    arguments: Arguments = [],  # noqa: B006
    outputs: Outputs = None,
    verify: Annotated[bool, typer.Option(help="Check the groups numerically in float64.")] = True,
    draw: Annotated[Path | None, typer.Option(help="Picture of the tie graph: .png, .svg or .pdf.")] = None,
    classes: Annotated[str, typer.Option(help="What is checked: full (each group's class) or permutation.")] = "full",
    seed: Seed = 0,
) -> None:
    """Symmetries: groups with their classes and members, pinned axes."""
    check_network(model, (), inputs)
    import vfx
    from vfx import api
    from vfx.analyse.drawing import FORMATS as DRAWINGS

    if draw is not None:
        check_writable(draw, DRAWINGS)
    groups = api.symmetry(construct(model, arguments), examples_of(inputs, model), outputs=outputs or None)
    print(groups)
    if verify:
        error = vfx.verify(groups, seed, classes=classes)
        print(f"verified: relative error {error:.1e} (float64, random group elements)")
    if draw is not None:
        print(f"wrote {vfx.draw(groups, draw)}")


@app.command()
def layers(model: Model, inputs: Inputs = [], arguments: Arguments = []) -> None:  # noqa: B006
    """Numbered conv and linear layers, shortcuts, and the joins of each cut."""
    check_network(model, (), inputs)
    from vfx import api

    print(api.layers(construct(model, arguments), examples_of(inputs, model)))


@app.command()
@with_keywords(ExportOptions)
def export(
    checkpoint: Annotated[Path, typer.Argument(help="State dict of the model, or a .pt2 network.")],
    out: Annotated[
        list[Path], typer.Option("--out", "-o", help="Result: .onnx, .safetensors, .pt2 or .aoti; repeatable.")
    ],
    given: Given,
    inputs: Inputs = [],  # noqa: B006
    model: Annotated[str | None, typer.Option("--model", "-m", help="Constructor, as for the other commands.")] = None,
    arguments: Arguments = [],  # noqa: B006
    entry: Entry = None,
) -> None:
    """Convert a checkpoint to ONNX, .pt2, safetensors or compiled code; ONNX is checked in ONNX Runtime."""
    check_outputs(out, rebuilt="the network of a .pt2 file" if checkpoint.suffix.lower() == ".pt2" else "")
    check_network(model, [checkpoint], inputs)
    if model is None and checkpoint.suffix.lower() != ".pt2":
        raise ArgumentError(f"{checkpoint.name} holds tensors only; --model says which network they belong to")
    from vfx.emit.files import export as write
    from vfx.emit.files import load

    examples = examples_of(inputs, model or "")
    options = values(ExportOptions, given, data=data_of(given["data"], examples, model or ""))
    only = [path for path in out if path.suffix.lower() == ".onnx"] or out  # options that no file has are refused
    network = load(checkpoint, construct(model, arguments) if model else None, entry=entry)
    origin = origin_of([checkpoint])
    for path in out:
        write(network, path, examples, origin=origin, **(options if path in only else {}))
        print(f"wrote {path} ({size_of(path)})")


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

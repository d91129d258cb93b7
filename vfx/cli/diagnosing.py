"""``vfx diagnose`` and ``vfx barrier``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vfx.cli.app import app
from vfx.cli.early import check_network
from vfx.cli.inputs import data_of, examples_of, load_all, load_network, optional, required
from vfx.cli.options import Arguments, Csv, Data, Draw, Entry, Inputs, Json, Model, Samples, Seed
from vfx.cli.results import check_outputs, picture, put, tell
from vfx.extras import need
from vfx.files import check_writable


@app.command()
def diagnose(
    checkpoint: Annotated[Path, typer.Argument(help="The merged network: a state dict of the model, or .pt2.")],
    references: Annotated[list[Path], typer.Argument(help="State dicts of the edges.")],
    model: Model,
    inputs: Inputs = [],  # noqa: B006
    data: Data = None,
    arguments: Arguments = [],  # noqa: B006
    entry: Entry = None,
    match: Annotated[str, typer.Option(help="Align the edges first: auto, none, weight or activation.")] = "auto",
    max_samples: Samples = None,
    seed: Seed = 0,
    html: Annotated[Path | None, typer.Option(help="Write one page with figures and table.")] = None,
    csv: Csv = None,
    report: Json = None,
) -> None:
    """Where a merged network lost its edges' features, and what to try."""
    check_outputs(None, html, csv, report)
    if html is not None:
        need("matplotlib", "the page of a diagnosis")
    check_network(model, [checkpoint, *references], inputs)
    source = required(data)
    from vfx.diagnosis.diagnose import diagnose as run

    whole = checkpoint.suffix.lower() == ".pt2"
    network = load_network(checkpoint) if whole else load_all([checkpoint], model, arguments, entry)[0]
    examples = examples_of(inputs, model)
    diagnosis = run(
        network,
        load_all(references, model, arguments, entry),
        examples,
        data=data_of(source, examples, model),
        match=optional(match),
        max_samples=max_samples,
        seed=seed,
    )
    tell(diagnosis, csv, report)
    if html is not None:
        diagnosis.to_html(html)
        tell(f"wrote {html}", csv, report)
    put(csv, diagnosis.to_csv, report)
    put(report, diagnosis.to_json, csv)


@app.command()
def barrier(
    checkpoints: Annotated[list[Path], typer.Argument(help="Two state dicts.")],
    model: Model,
    inputs: Inputs = [],  # noqa: B006
    data: Data = None,
    arguments: Arguments = [],  # noqa: B006
    entry: Entry = None,
    evaluate: Annotated[
        str | None, typer.Option(help="What is measured on, with labels if it has any; like --data.")
    ] = None,
    match: Annotated[str, typer.Option(help="none, weight or activation.")] = "activation",
    normalize: Annotated[str | None, typer.Option(help="Methods, e.g. none,repair,rescale.")] = None,
    points: Annotated[int, typer.Option(help="Values of alpha, both ends among them.")] = 11,
    max_samples: Samples = None,
    seed: Seed = 0,
    draw: Draw = None,
    report: Json = None,
) -> None:
    """Accuracy and loss on the line between two networks, before and after alignment and normalization."""
    check_outputs(None, report)
    if draw is not None:
        check_writable(draw, (".png",))
    check_network(model, checkpoints, inputs)
    source = required(data)
    from vfx.diagnosis.barrier import barrier as run

    examples = examples_of(inputs, model)
    curves = run(
        load_all(checkpoints, model, arguments, entry),
        examples,
        data=data_of(source, examples, model),
        evaluate=data_of(evaluate or source, examples, model, "test"),
        match=optional(match),
        normalize=[optional(name) for name in normalize.split(",")] if normalize else None,
        points=points,
        max_samples=max_samples,
        seed=seed,
    )
    tell(curves, report)
    put(draw, lambda: picture(curves), report)
    put(report, curves.to_json)

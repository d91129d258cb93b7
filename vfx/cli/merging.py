"""``vfx merge``, ``vfx repair`` and ``vfx transfer``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vfx.cli.app import app
from vfx.cli.early import check_models, check_network
from vfx.cli.inputs import combine_of, cut_of, data_of, examples_of, load_all, match_of, normalization_of, required
from vfx.cli.keywords import Given, values, with_keywords
from vfx.cli.options import (
    Arguments,
    Chosen,
    Entry,
    Evaluate,
    Inputs,
    Json,
    MatchArguments,
    Memory,
    Model,
    Models,
    Out,
    Site,
    Sweep,
)
from vfx.cli.results import check_outputs, evaluated, finish
from vfx.errors import ArgumentError
from vfx.options import MergeOptions, RepairOptions, TransferOptions


@app.command()
@with_keywords(MergeOptions)
def merge(
    checkpoints: Annotated[list[Path], typer.Argument(help="Two or more state dicts: .safetensors, .pt or .pth.")],
    models: Models,
    given: Given,
    inputs: Inputs = [],  # noqa: B006
    arguments: Arguments = [],  # noqa: B006
    entry: Entry = None,
    evaluate: Evaluate = None,
    match_arguments: MatchArguments = [],  # noqa: B006
    match_layers: Annotated[int | None, typer.Option(help="Align only what the first layers produce.")] = None,
    combine_arguments: Annotated[
        list[str], typer.Option("--combine-arg", help="Option of the combining method, e.g. keep=0.3; repeatable.")
    ] = [],  # noqa: B006
    layers: Chosen = None,
    site: Site = "preactivation",
    sweep: Sweep = "exact",
    bias_count: Annotated[int | None, typer.Option(help="Layers of bias removal; default: chosen on the data.")] = None,
    bias_direction: Annotated[str | None, typer.Option(help="backward or forward; default: chosen.")] = None,
    memory_limit: Memory = None,
    out: Out = None,
    report: Json = None,
) -> None:
    """Merge two or more checkpoints of one architecture into one network."""
    kept = [f"{name}={given[name]}" for name in ("preserve", "heads") if cut_of(given[name]) != 0]
    check_outputs(out, report, rebuilt=f"a network with a branch for each edge ({', '.join(kept)})" if kept else "")
    check_models(models, checkpoints)
    _check_judged(evaluate, given)
    model = models[0]
    check_network(
        model, [*checkpoints, *([given["base"]] if given["base"] else []), *(given["references"] or ())], inputs
    )
    from vfx import api
    from vfx.emit.files import load

    edges, examples = load_all(checkpoints, models, arguments, entry), examples_of(inputs, model)
    judging = data_of(evaluate, examples, model, "test")
    asked = {"site": site, "sweep": sweep, "count": bias_count, "direction": bias_direction}
    made = {
        "data": data_of(given["data"], examples, model),
        "match": match_of(given["match"], match_layers, given["data"], match_arguments),
        "combine": combine_of(given["combine"], combine_arguments),
        "normalize": normalization_of(given["normalize"], layers, memory_limit, **asked),
        "base": None if given["base"] is None else load(given["base"], entry=entry),
        "references": load_all(given["references"] or [], model, arguments, entry),
    }
    result = api.merge(edges, examples, **values(MergeOptions, given, **made))
    finish(result, out, report, evaluated(edges, result, examples, judging, checkpoints), checkpoints)


def _check_judged(evaluate: str | None, given: Given) -> None:
    """Raise ArgumentError where what comes out decides several times, each time among other classes."""
    if evaluate is not None and cut_of(given["heads"]) != 0 and given["head_output"] != "mean":
        raise ArgumentError(
            "--evaluate measures one decision a sample, and --heads keeps one for each checkpoint: measure them by vfx "
            "compare --heads with --evaluate once for each checkpoint, or average them by --head-output mean"
        )


@app.command()
@with_keywords(RepairOptions)
def repair(
    checkpoint: Annotated[Path, typer.Argument(help="The network to repair.")],
    references: Annotated[list[Path], typer.Argument(help="Networks whose statistics are the goal.")],
    model: Model,
    given: Given,
    inputs: Inputs = [],  # noqa: B006
    arguments: Arguments = [],  # noqa: B006
    entry: Entry = None,
    evaluate: Evaluate = None,
    layers: Chosen = None,
    site: Site = "preactivation",
    sweep: Sweep = "exact",
    memory_limit: Memory = None,
    out: Out = None,
    report: Json = None,
) -> None:
    """Bring a network's layer statistics to those of its references."""
    check_outputs(out, report)
    files = [checkpoint, *references]
    check_network(model, files, inputs)
    source = required(given["data"])
    from vfx import api

    network, *others = load_all(files, model, arguments, entry)
    examples = examples_of(inputs, model)
    judging = data_of(evaluate, examples, model, "test")
    made = {
        "data": data_of(source, examples, model),
        "method": normalization_of(given["method"], layers, memory_limit, site=site, sweep=sweep) or "none",
    }
    result = api.repair(network, others, examples, **values(RepairOptions, given, **made))
    finish(result, out, report, evaluated([network], result, examples, judging, [checkpoint]), files)


@app.command()
@with_keywords(TransferOptions)
def transfer(
    tuned: Annotated[Path, typer.Argument(help="FROM after fine-tuning; with --difference the change itself.")],
    from_: Annotated[Path, typer.Argument(metavar="FROM", help="The network that was fine-tuned, as it was before.")],
    to: Annotated[Path, typer.Argument(help="The network of the same architecture that gets the change.")],
    model: Model,
    given: Given,
    inputs: Inputs = [],  # noqa: B006
    arguments: Arguments = [],  # noqa: B006
    entry: Entry = None,
    match_arguments: MatchArguments = [],  # noqa: B006
    evaluate: Evaluate = None,
    out: Out = None,
    report: Json = None,
) -> None:
    """Move what fine-tuning changed in one network into another one, without training."""
    check_outputs(out, report)
    files = [tuned, from_, to]
    check_network(model, files, inputs)
    from vfx import api
    from vfx.emit.files import load

    start, target = load_all([from_, to], model, arguments, entry)
    change = load(tuned, entry=entry) if given["difference"] else load_all([tuned], model, arguments, entry)[0]
    examples = examples_of(inputs, model)
    judging = data_of(evaluate, examples, model, "test")
    made = {
        "data": data_of(given["data"], examples, model),
        "match": match_of(given["match"], None, given["data"], match_arguments),
    }
    result = api.transfer(change, start, target, examples, **values(TransferOptions, given, **made))
    networks, measured = ([target], [to]) if given["difference"] else ([change, target], [tuned, to])
    finish(result, out, report, evaluated(networks, result, examples, judging, measured, ensemble=False), files)

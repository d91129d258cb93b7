"""``vfx merge`` and ``vfx repair``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vfx.cli.app import app
from vfx.cli.early import check_choice, check_network
from vfx.cli.inputs import (
    cut_of,
    data_of,
    examples_of,
    floats,
    load_all,
    match_of,
    normalization_of,
    optional,
    required,
)
from vfx.cli.options import (
    Arguments,
    Chosen,
    Data,
    Device,
    Entry,
    Evaluate,
    Inputs,
    Json,
    Match,
    Memory,
    Model,
    Normalize,
    Out,
    Outputs,
    Samples,
    Seed,
    Site,
    Solve,
    Sweep,
    Verify,
)
from vfx.cli.results import check_outputs, evaluated, finish


@app.command()
def merge(
    checkpoints: Annotated[list[Path], typer.Argument(help="Two or more state dicts: .safetensors, .pt or .pth.")],
    model: Model,
    inputs: Inputs = [],  # noqa: B006
    arguments: Arguments = [],  # noqa: B006
    entry: Entry = None,
    data: Data = None,
    evaluate: Evaluate = None,
    match: Match = "auto",
    match_arguments: Annotated[
        list[str], typer.Option("--match-arg", help="Option of the matching method, e.g. iterations=50; repeatable.")
    ] = [],  # noqa: B006
    restarts: Annotated[int, typer.Option(help="Further runs of weight, activation, c2m3 or ste.")] = 0,
    solve: Solve = "auto",
    follow: Annotated[
        str, typer.Option(help="First layers that follow one edge: auto, a number, or a module's name.")
    ] = "auto",
    follow_edge: Annotated[str, typer.Option(help="The edge that they follow: auto, or its number from 0.")] = "auto",
    judge: Annotated[
        str, typer.Option(help="What outputs are: auto, logits, probabilities, embedding or regression.")
    ] = "auto",
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
    classes: Annotated[
        str, typer.Option(help="What weight and activation matching find: full or permutation.")
    ] = "full",
    prepare: Annotated[str, typer.Option(help="Before matching: none, lift, balance, or remove_bias.")] = "none",
    references: Annotated[
        list[Path] | None, typer.Option("--reference", help="Networks whose statistics are the goal, repeatable.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="One weight for each edge, e.g. 0.3,0.7.")] = None,
    max_samples: Samples = None,
    outputs: Outputs = None,
    verify: Verify = True,
    seed: Seed = 0,
    device: Device = None,
    out: Out = None,
    report: Json = None,
) -> None:
    """Merge two or more checkpoints of one architecture into one network."""
    kept = [f"{name}={value}" for name, value in (("preserve", preserve), ("heads", heads)) if cut_of(value) != 0]
    check_outputs(out, report, rebuilt=f"a network with a branch for each edge ({', '.join(kept)})" if kept else "")
    check_network(model, [*checkpoints, *(references or ())], inputs)
    check_choice("--match", match, "match/catalogue.py", "MATCHERS", "auto", "none")
    check_choice("--normalize", normalize, "normalize/catalogue.py", "METHODS", "auto", "none")
    from vfx import api

    edges, examples = load_all(checkpoints, model, arguments, entry), examples_of(inputs, model)
    judging = data_of(evaluate, examples, model, "test")
    asked = {"site": site, "sweep": sweep, "count": bias_count, "direction": bias_direction}
    result = api.merge(
        edges,
        examples,
        data=data_of(data, examples, model),
        match=match_of(match, match_layers, data, match_arguments),
        restarts=restarts,
        solve=optional(solve),
        follow=cut_of(follow),
        follow_edge=cut_of(follow_edge),
        judge=judge,  # type: ignore[arg-type]
        normalize=normalization_of(normalize, layers, memory_limit, **asked),
        classes=classes,
        prepare=optional(prepare),
        references=load_all(references or [], model, arguments, entry),
        preserve=cut_of(preserve),
        join=join,  # type: ignore[arg-type]
        heads=cut_of(heads),
        head_output=head_output,  # type: ignore[arg-type]
        weights=floats(weights),
        max_samples=max_samples,
        outputs=outputs or None,
        verify=verify,
        seed=seed,
        device=device,
    )
    finish(result, out, report, evaluated(edges, result, examples, judging, checkpoints), checkpoints)


@app.command()
def repair(
    checkpoint: Annotated[Path, typer.Argument(help="The network to repair.")],
    references: Annotated[list[Path], typer.Argument(help="Networks whose statistics are the goal.")],
    model: Model,
    inputs: Inputs = [],  # noqa: B006
    data: Data = None,
    arguments: Arguments = [],  # noqa: B006
    entry: Entry = None,
    evaluate: Evaluate = None,
    solve: Solve = "auto",
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
    check_outputs(out, report)
    check_network(model, [checkpoint, *references], inputs)
    check_choice("--method", method, "normalize/catalogue.py", "METHODS", "auto", "none")
    source = required(data)
    from vfx import api

    network, *others = load_all([checkpoint, *references], model, arguments, entry)
    examples = examples_of(inputs, model)
    judging = data_of(evaluate, examples, model, "test")
    result = api.repair(
        network,
        others,
        examples,
        data=data_of(source, examples, model),
        solve=optional(solve),
        method=normalization_of(method, layers, memory_limit, site=site, sweep=sweep) or "none",
        match=optional(match),
        max_samples=max_samples,
        seed=seed,
    )
    finish(
        result, out, report, evaluated([network], result, examples, judging, [checkpoint]), [checkpoint, *references]
    )

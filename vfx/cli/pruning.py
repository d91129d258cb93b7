"""``vfx prune`` and ``vfx prune-structured``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vfx.address import option
from vfx.cli.app import app
from vfx.cli.early import check_choice, check_network
from vfx.cli.inputs import (
    budget_of,
    data_of,
    examples_of,
    load_all,
    optional,
    sparsity_of,
)
from vfx.cli.names import choices, names_in
from vfx.cli.options import (
    Arguments,
    Data,
    Device,
    Entry,
    Evaluate,
    Inputs,
    Json,
    Model,
    Out,
    Outputs,
    Repair,
    Samples,
    Seed,
    Solve,
    Verify,
)
from vfx.cli.results import check_outputs, evaluated, finish


@app.command()
def prune(
    checkpoint: Annotated[Path, typer.Argument(help="State dict of the network: .safetensors, .pt or .pth.")],
    model: Model,
    inputs: Inputs = [],  # noqa: B006
    arguments: Arguments = [],  # noqa: B006
    entry: Entry = None,
    sparsity: Annotated[
        list[str] | None,
        typer.Option("--sparsity", "-s", help="Share of the weights that go, or glob=share for layers; repeatable."),
    ] = None,
    score: Annotated[str, typer.Option(help=choices(*names_in("pruning/scores/catalogue.py", "SCORES")))] = "magnitude",
    score_arguments: Annotated[
        list[str], typer.Option("--score-arg", help="Option of the score, e.g. block=1000; repeatable.")
    ] = [],  # noqa: B006
    scope: Annotated[str, typer.Option(help="auto, global, layer, row, or a pattern such as 2:4.")] = "auto",
    data: Data = None,
    evaluate: Evaluate = None,
    max_samples: Samples = None,
    repair_samples: Annotated[int, typer.Option(help="Samples that the repair reads.")] = 64,
    protect: Annotated[
        list[str] | None, typer.Option(help="Layers left alone: auto, none, first, head or a glob; repeatable.")
    ] = None,
    solve: Solve = "auto",
    normalize: Repair = "auto",
    steps: Annotated[int, typer.Option(help="One-shot steps, scores taken anew in each.")] = 1,
    schedule: Annotated[str, typer.Option(help="How the sparsity grows with the steps: cubic or linear.")] = "cubic",
    masks: Annotated[str, typer.Option(help="permanent, parametrize or semi_structured (2:4 on CUDA).")] = "permanent",
    outputs: Outputs = None,
    verify: Verify = True,
    seed: Seed = 0,
    device: Device = None,
    out: Out = None,
    report: Json = None,
) -> None:
    """Prune a trained network in one shot and solve what is left for its outputs."""
    check_outputs(out, report)
    check_network(model, [checkpoint], inputs)
    check_choice("--score", score, "pruning/scores/catalogue.py", "SCORES")
    share = sparsity_of(sparsity)
    from vfx import api
    from vfx.pruning.scores.catalogue import score_named

    (network,), examples = load_all([checkpoint], model, arguments, entry), examples_of(inputs, model)
    judging = data_of(evaluate, examples, model, "test")
    result = api.prune(
        network,
        examples,
        sparsity=share,
        score=score_named(score, **dict(option(text, "--score-arg") for text in score_arguments)),
        scope=scope,
        data=data_of(data, examples, model),
        max_samples=max_samples,
        repair_samples=repair_samples,
        protect="auto" if protect in (None, [], ["auto"]) else [name for name in protect or () if name != "none"],
        solve=optional(solve),
        normalize=optional(normalize),
        steps=steps,
        schedule=schedule,
        masks=masks,
        outputs=outputs or None,
        verify=verify,
        seed=seed,
        device=device,
    )
    finish(result, out, report, evaluated([network], result, examples, judging, [checkpoint]), [checkpoint])


@app.command("prune-structured")
def prune_structured(
    checkpoint: Annotated[Path, typer.Argument(help="State dict of the network: .safetensors, .pt or .pth.")],
    model: Model,
    inputs: Inputs = [],  # noqa: B006
    sparsity: Annotated[
        float | None, typer.Option("--sparsity", "-s", help="Share of the channels of each group that goes.")
    ] = None,
    arguments: Arguments = [],  # noqa: B006
    entry: Entry = None,
    method: Annotated[str, typer.Option(help="remove, or fold: merge channels by k-means.")] = "remove",
    score: Annotated[str, typer.Option(help=choices("auto", *names_in("pruning/groups.py", "METHODS")))] = "auto",
    allocation: Annotated[str, typer.Option(help=choices(*names_in("pruning/widths.py", "ALLOCATIONS")))] = "uniform",
    budget: Annotated[
        str | None, typer.Option(help="What is left instead, e.g. flops=0.5: params, flops or latency.")
    ] = None,
    round_to: Annotated[int, typer.Option(help="Kept widths are multiples of it.")] = 1,
    units: Annotated[
        str, typer.Option(help="What goes inside heads and groups: channels, whole blocks, both, or auto.")
    ] = "auto",
    protect: Annotated[list[str] | None, typer.Option(help="Weight whose groups stay whole; repeatable.")] = None,
    data: Data = None,
    evaluate: Evaluate = None,
    max_samples: Samples = None,
    repair_samples: Annotated[int, typer.Option(help="Samples that the repair reads.")] = 64,
    solve: Solve = "auto",
    normalize: Repair = "auto",
    outputs: Outputs = None,
    verify: Verify = True,
    seed: Seed = 0,
    device: Device = None,
    out: Out = None,
    report: Json = None,
) -> None:
    """Remove or fold whole channels, heads and groups: a smaller network."""
    check_outputs(out, report, rebuilt="a network with fewer channels" if sparsity != 0 else "")
    check_network(model, [checkpoint], inputs)
    check_choice("--score", score, "pruning/groups.py", "METHODS", "auto")
    check_choice("--allocation", allocation, "pruning/widths.py", "ALLOCATIONS")
    share = budget_of(budget)
    from vfx import api

    (network,), examples = load_all([checkpoint], model, arguments, entry), examples_of(inputs, model)
    judging = data_of(evaluate, examples, model, "test")
    result = api.prune_structured(
        network,
        examples,
        sparsity=sparsity,
        method=method,
        score=score,
        allocation=allocation,
        budget=share,
        round_to=round_to,
        units=units,
        protect=protect or (),
        data=data_of(data, examples, model),
        max_samples=max_samples,
        repair_samples=repair_samples,
        solve=optional(solve),
        normalize=optional(normalize),
        outputs=outputs or None,
        verify=verify,
        seed=seed,
        device=device,
    )
    finish(result, out, report, evaluated([network], result, examples, judging, [checkpoint]), [checkpoint])

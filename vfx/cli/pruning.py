"""``vfx prune`` and ``vfx prune-structured``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vfx.address import option
from vfx.cli.app import app
from vfx.cli.early import check_network
from vfx.cli.inputs import data_of, examples_of, load_all
from vfx.cli.keywords import Given, values, with_keywords
from vfx.cli.options import Arguments, Entry, Evaluate, Inputs, Json, Model, Out
from vfx.cli.results import STDOUT, check_outputs, evaluated, finish
from vfx.errors import ArgumentError
from vfx.options import PruneOptions, StructuredOptions

Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="State dict of the network: .safetensors, .pt or .pth.")
]


@app.command()
@with_keywords(PruneOptions)
def prune(
    network_file: Checkpoint,
    model: Model,
    given: Given,
    inputs: Inputs = [],  # noqa: B006
    arguments: Arguments = [],  # noqa: B006
    entry: Entry = None,
    score_arguments: Annotated[
        list[str], typer.Option("--score-arg", help="Option of the score, e.g. block=1000; repeatable.")
    ] = [],  # noqa: B006
    evaluate: Evaluate = None,
    out: Out = None,
    report: Json = None,
) -> None:
    """Prune a trained network in one shot and solve what is left for its outputs."""
    check_outputs(out, report)
    check_network(model, [network_file], inputs)
    asked = values(PruneOptions, given)  # raises before anything takes time
    from vfx import api

    (network,), examples = load_all([network_file], model, arguments, entry), examples_of(inputs, model)
    judging = data_of(evaluate, examples, model, "test")
    protected = given["protect"]
    asked |= {
        "data": data_of(given["data"], examples, model),
        "score": _score(given["score"], dict(option(text, "--score-arg") for text in score_arguments)),
        "protect": "auto" if protected in (None, [], ["auto"]) else [name for name in protected if name != "none"],
    }
    result = api.prune(network, examples, **asked)
    finish(result, out, report, evaluated([network], result, examples, judging, [network_file]), [network_file])


def _score(name: str, options: dict[str, Any]) -> Any:
    """A score with its options. Raises ArgumentError."""
    from vfx.pruning.scores.catalogue import score_named

    if name != "auto":
        return score_named(name, **options)
    if options:
        raise ArgumentError("--score-arg: name the score that takes it (--score wanda)")
    return name


@app.command("prune-structured")
@with_keywords(StructuredOptions)
def prune_structured(
    network_file: Checkpoint,
    model: Model,
    given: Given,
    inputs: Inputs = [],  # noqa: B006
    arguments: Arguments = [],  # noqa: B006
    entry: Entry = None,
    evaluate: Evaluate = None,
    out: Out = None,
    report: Json = None,
) -> None:
    """Remove or fold whole channels, heads and groups: a smaller network."""
    asked = values(StructuredOptions, given)  # raises before anything takes time
    check_outputs(out, report, rebuilt="a network with fewer channels" if asked["sparsity"] != 0 else "")
    check_network(model, [network_file], inputs)
    from vfx import api

    (network,), examples = load_all([network_file], model, arguments, entry), examples_of(inputs, model)
    judging = data_of(evaluate, examples, model, "test")
    asked |= {"data": data_of(given["data"], examples, model)}
    pruned = api.prune_structured(network, examples, **asked)
    for share, result in getattr(pruned, "networks", {None: pruned}).items():
        files, said = [[_of_width(path, share) for path in paths] for paths in (out or [], [report] if report else [])]
        evaluation = evaluated([network], result, examples, judging, [network_file])
        finish(result, files, next(iter(said), None), evaluation, [network_file])


def _of_width(path: Path, share: float | None) -> Path:
    """A file's name for one of several widths; standard output stays."""
    return path if share is None or path == STDOUT else path.with_stem(f"{path.stem}-{share:g}")

"""What merging and repairing share: the normalization asked for, what it reads and the goals it goes to."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vfx.alphas import edge_weights
from vfx.analyse.layer_view import batch_norms
from vfx.analyse.layers import number_layers
from vfx.analyse.symmetry import symmetry as infer_symmetry
from vfx.api.tracing import weights_of
from vfx.checks import check_edges, check_same_function
from vfx.errors import ArgumentError, UncorrectedNote
from vfx.match.matcher import Matcher
from vfx.normalize.catalogue import Normalization, candidates
from vfx.passes.align import Align
from vfx.passes.fold_normalization import FoldNormalization
from vfx.program import Goal, Program
from vfx.statistics.collect import READS, Statistics
from vfx.statistics.collect import collect as collect_statistics


def uncorrected(data: Any, normalize: Any, done: str, missed: str) -> tuple[str, ...]:
    """The note, also a warning, that nothing was corrected because there are no data; none where that was asked for."""
    if data is not None or normalize != "auto":
        return ()
    note = (
        f"{done} without data: nothing was corrected, and {missed}. Pass data= (--data): inputs, without labels; "
        "layers are then solved or normalized for what is lost. normalize=None says that this is wanted"
    )
    # behind the public call, its check of arguments, its stages and one of them
    warnings.warn(note, UncorrectedNote, stacklevel=6)
    return (note,)


def usual(program: Program) -> str:
    return "reset" if batch_norms(program) else "rescale"


def without_batch_norm(
    program: Program, asked: Normalization | None, verify: bool
) -> tuple[Program, Normalization | None]:
    """BatchNorm folded into its layers: linear maps must not go through a variance (CCA merging's negative ones).

    What RESET does for a BatchNorm REPAIR then does for the layer it was folded into.
    """
    if not batch_norms(program):
        return program, asked
    folded = FoldNormalization(batch_norm=True, verify=verify)(program)
    return folded, replace(asked, method="repair") if asked is not None and asked.method == "reset" else asked


def reads_for(asked: Normalization | None, finder: Matcher | None, program: Program) -> list[str]:
    """What the statistics must hold, in the order in which ``vfx.collect`` reads it."""
    tried = [] if asked is None else [asked]
    if asked is not None and asked.method == "auto":
        tried = [candidate for candidate in candidates(asked, program).values() if candidate is not None]
    goals = any(candidate.needs_goals for candidate in tried)
    behind = goals and any(candidate.behind for candidate in tried)
    wanted = {"layers"} if goals else set()
    wanted |= {"activations"} if behind else set()
    wanted |= set(finder.needs) if finder is not None else set()
    return [name for name in READS if name in wanted]


def check_statistics(statistics: Statistics | None, reads: Sequence[str], asked: Normalization | None) -> None:
    """What "auto" would only try behind the activations is no reason to refuse statistics without them."""
    optional = {"activations"} if asked is not None and asked.method == "auto" and not asked.behind else set()
    for name in (read for read in reads if read not in optional):
        if statistics is not None and name not in statistics.reads:
            what = "layer statistics for the normalization" if name == "layers" else f"{name!r}, which are needed"
            raise ArgumentError(f"these statistics hold no {what}; collect them again")


def check_exact(finder: Matcher | None) -> None:
    """Raise ArgumentError for a matcher of linear maps: references keep their functions."""
    if finder is not None and not finder.exact:
        raise ArgumentError("references= are aligned by permutations; match with 'weight' or 'activation'")


def reference_goals(
    program: Program, references: Sequence[nn.Module], finder: Matcher | None, data: Any, asked: Normalization,
    own: dict[str, Any], options: dict[str, Any],
) -> dict[str, Goal]:  # fmt: skip
    """The references' mean statistics in the first edge's channel order, a row for each edge."""
    check_exact(finder)
    check_edges([program.module or references[0], *references])
    joint = program.with_weights([program.weights[0], *(weights_of(program, model) for model in references)])
    check_same_function(joint.with_weights(joint.weights[1:]), references)
    facts = infer_symmetry(joint)
    if data is None:
        raise ArgumentError("references= are run on data; give data=")
    statistics = collect_statistics(joint, facts, data, activations=asked.behind, **options)
    goal_of = Align(finder, data, statistics=statistics, **own)(joint).goals
    rows = {name: (goal.mean[1:].mean(0), goal.std[1:].mean(0)) for name, goal in goal_of.items()}
    return {name: Goal(*(x.expand(program.edges, -1) for x in pair)) for name, pair in rows.items()}


def given_goals(program: Program, statistics: Any, weights: float | Sequence[float] | None) -> dict[str, Goal]:
    """Goals from statistics of another network of this architecture."""
    goal_of = statistics.goals()
    sizes = {name: m[0].mean.shape[0] for name, m in statistics.layers.items()}
    channels = {x.node: program.node(x.node).meta["val"].shape[x.channel] for x in number_layers(program)}
    if (
        not goal_of
        or any(channels.get(name, size) != size for name, size in sizes.items())
        or not set(goal_of) & set(channels)
    ):
        raise ArgumentError("goals= hold no layer statistics of this architecture; collect them with vfx.collect")
    shares = torch.tensor(edge_weights(weights, len(next(iter(goal_of.values())).mean)), dtype=torch.float64)
    mix = lambda x: (x.cpu() * shares[:, None]).sum(0, keepdim=True)  # noqa: E731
    return {name: Goal(mix(goal.mean), mix(goal.std)) for name, goal in goal_of.items()}

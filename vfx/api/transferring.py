"""``vfx.transfer``: what fine-tuning changed in one network, brought into the frame of another and added there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vfx.analyse.symmetry import Symmetry
from vfx.api.results import Result, result_of, run_pass
from vfx.api.tracing import symmetry, trace
from vfx.arguments import checked
from vfx.combine.base import tensors_of
from vfx.errors import ArchitectureError, ArgumentError
from vfx.match.catalogue import matcher
from vfx.match.matcher import Matcher, Matching
from vfx.operators import arguments, operator_of
from vfx.passes.align import Align
from vfx.program import Program
from vfx.report import Stopwatch
from vfx.statistics.data import Batches, reusable


@checked
def transfer(
    tuned: Any,
    from_: nn.Module,
    to: nn.Module,
    example_inputs: Any,
    *,
    difference: bool = False,
    scale: float = 1.0,
    data: Any = None,
    match: str | Matcher | None = "auto",
    classes: str = "full",
    restarts: int = 0,
    max_samples: int | None = None,
    verify: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """Move what fine-tuning changed in one network into another network of its architecture, without training.

    ``tuned``: ``from_`` after fine-tuning: a network, its state dict or the path of a checkpoint; with ``difference``
    the change itself, where names that it lacks do not change. ``to``: the network that gets the change, trained from
    another seed or on other data; neither is changed. A matching finds the group element g that brings ``from_`` to
    the channels (and scales, signs and bases, where ``classes`` is "full") of ``to``, proves that it keeps the
    function, and the result is to + ``scale`` · (g(tuned) − g(from_)): running variances are multiplied by their ratio,
    whole numbers and masks stay those of ``to``. ``match``, ``restarts``, ``data`` and the others are those of
    ``vfx.merge``; "auto" reads activations if there are data, and None moves nothing. Where ``to`` is g(from_) the
    result computes what ``tuned`` does. Returns the class of ``to``.

    Source: the idea of *Update Your Transformer to the Latest Release: Re-Basin of Task Vectors* (Rinaldi et al.,
    ICML 2025, "TransFusion"), here for any architecture and over the whole symmetry classes.
    Raises ArgumentError, ArchitectureError, WeightError, DataError, CaptureError, VerificationError.

    >>> moved = vfx.transfer(tuned, pretrained, other_pretrained, x, data=images)
    """
    watch, data = Stopwatch(progress), reusable(data)
    finder = _finder(match, restarts, classes, data)
    with watch("trace"):
        program = trace([to, from_], example_inputs)
    own = _tuned(tuned, program, difference)
    batches = data if finder is not None and finder.needs else None
    aligning = Align(finder, _limited(batches, program, max_samples), seed=seed, verify=verify, progress=progress)
    aligned = run_pass(program, aligning, watch)
    facts = symmetry(program)
    matching = aligned.record.matching or Matching(({},) * program.edges)
    moved = matching.aligned(facts, own, 1)
    weights = _added(facts, program, aligned.program.weights[1], moved, scale)
    name = "None" if finder is None else type(finder).__name__
    result = program.with_weights([weights], f"Transfer({name})").with_notes(aligned.program.notes)
    chosen = {"outcome": _outcome(program, own, matching, facts)}
    return result_of(result, program, watch, aligned.record, chosen=chosen, verify=verify)


def _finder(match: str | Matcher | None, restarts: int, classes: str, data: Any) -> Matcher | None:
    """The matcher that was asked for, or that the data allow. Raises ArgumentError for one of linear maps."""
    if match == "auto":
        match = "weight" if data is None else "activation"
    finder = matcher(match, restarts, classes)
    if finder is not None and not finder.exact:
        raise ArgumentError(f"match={match!r} finds maps that change functions; transfer by 'weight' or 'activation'")
    if finder is not None and finder.needs and data is None:
        raise ArgumentError(f"match={match!r} runs the networks; give data=, or match by 'weight'")
    return finder


def _limited(data: Any, program: Program, max_samples: int | None) -> Any:
    """The data up to ``max_samples``."""
    if data is None or max_samples is None:
        return data
    return Batches(program, data, max_samples)


def _tuned(tuned: Any, program: Program, difference: bool) -> dict[str, Tensor]:
    """The fine-tuned network's tensors. Raises ArchitectureError for parameters that it lacks."""
    start = program.weights[1]
    found = tensors_of(tuned, program, start, "tuned", others=not difference)
    if difference:
        changed = {name: start[name] + tensor.to(start[name]) for name, tensor in found.items()}
        return {**start, **changed}
    absent = next((name for name in program.names() if program.is_parameter(name) and name not in found), None)
    if absent is not None:
        raise ArchitectureError(f"tuned= lacks {absent!r}; give the whole network, or difference=True for a change")
    return {**start, **{name: tensor.to(start[name]) for name, tensor in found.items()}}


def _added(
    facts: Symmetry, program: Program, start: Mapping[str, Tensor], moved: Mapping[str, Tensor], scale: float
) -> dict[str, Tensor]:
    """The weights of ``to`` with the change from ``start`` to ``moved``, both in its frame."""
    variances = _variances(program)
    result = {}
    for name, own in program.weights[0].items():
        if not own.is_floating_point() or name in program.masks:
            result[name] = own
            continue
        before, after = start[name].double(), moved[name].double()
        if name in variances:
            ratio = torch.where(before > 0, after / before.clamp_min(1e-300), 1.0)
            result[name] = (own.double() * ratio**scale).to(own)
        else:
            result[name] = (own.double() + scale * (after - before)).to(own)
    return result


def _variances(program: Program) -> set[str]:
    """Running variances: a sum could make them negative."""
    norms = [arguments(node) for node in program.graph.nodes if operator_of(node).is_norm]
    return {str(a["running_var"].target) for a in norms if hasattr(a.get("running_var"), "target")}


def _outcome(program: Program, own: Mapping[str, Tensor], matching: Matching, facts: Symmetry) -> str:
    """One sentence: how large the change is, and how near the two networks came to each other."""
    to, start = program.weights
    names = [name for name in program.names() if program.is_parameter(name)]
    moved = matching.aligned(facts, start, 1)

    def size(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
        return sum(float((one[name].double() - other[name].double()).square().sum()) for name in names) ** 0.5

    whole = sum(float(to[name].double().square().sum()) for name in names) ** 0.5 or 1.0
    return (
        f"a change of {size(own, start) / whole:.3g} of the weights' size was moved between networks that differ by "
        f"{size(to, moved) / whole:.3g} of it where they are matched ({size(to, start) / whole:.3g} as they are)"
    )

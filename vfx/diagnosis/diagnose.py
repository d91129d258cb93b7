"""``vfx.diagnose``: a merged network beside its edges, every measure from one pass over the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vfx.analyse.layer_view import batch_norms
from vfx.analyse.verify import preserved
from vfx.api import Result, symmetry, trace
from vfx.api.merge_report import MergeReport
from vfx.arguments import checked
from vfx.capture.signature import as_call
from vfx.diagnosis.compare import compare
from vfx.diagnosis.diagnosis import Diagnosis
from vfx.diagnosis.logits import Logits
from vfx.diagnosis.rows import LayerRow, overall
from vfx.diagnosis.verdict import judge
from vfx.elements import exact_part
from vfx.errors import ArchitectureError, ArgumentError, VerificationError
from vfx.match.catalogue import matcher
from vfx.match.matcher import Matcher, Matching, Problem
from vfx.program import Program
from vfx.proof import PRESERVED
from vfx.statistics.collect import collect
from vfx.statistics.data import Batches, reusable


@checked
@torch.no_grad()
def diagnose(
    merged: Result | nn.Module | Program,
    references: Sequence[nn.Module] | nn.Module | Program,
    example_inputs: Any = None,
    *,
    data: Any,
    match: str | Matcher | None = "auto",
    reference: Any = None,
    max_samples: int | None = None,
    device: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> Diagnosis:
    """Find where a merged (or pruned) network lost the features of its ``references``, and what to try.

    ``merged``: a Result, a module or a Program of one weight set. ``references``: the edges, or their Program. Layers
    are the same if they belong to modules of one name; the layers that PFM preserved are marked, not compared. Only
    one measure needs the edges' units in the merged network's order (units that an edge activates and merging
    silences): ``match`` "auto" takes the permutations that a Result was merged with, None takes the references as they
    are, "weight" or "activation" aligns them to the first. ``data``: batches as for ``merge``; read once.
    ``reference``: the input x₀ of the offset h = f(x₀), like ``example_inputs`` with one sample; by default 0, and the
    first example where inputs are integers.
    Raises ArgumentError, ArchitectureError, CaptureError, DataError.
    """
    data = reusable(data)
    network, edges = _programs(merged, references, example_inputs)
    if device is not None:
        network, edges = network.to(device), edges.to(device)
    edges, aligned = _align(edges, merged, match, data, max_samples, device, seed, progress)
    seen = compare(
        network,
        edges,
        data,
        max_samples=max_samples,
        device=device,
        reference=_reference(edges, reference),
        units=aligned,
        progress=progress,
    )
    return Diagnosis(
        rows=seen.rows,
        samples=seen.samples,
        edges=edges.edges,
        logits=Logits.of(seen.outputs),
        edge_logits=tuple(Logits.of(outputs) for outputs in seen.edge_outputs),
        verdict=judge(
            seen.rows, batch_norm=bool(batch_norms(network)), outputs=overall(seen.outputs), choices=_choices(merged)
        ),
        notes=(*_notes(merged, match, aligned), *_undefined(seen.rows)),
    )


def _programs(merged: Any, references: Any, example_inputs: Any) -> tuple[Program, Program]:
    """The merged network and its edges as Programs over the same inputs."""
    program = next((p for p in (merged, references) if isinstance(p, Program)), None)
    if isinstance(merged, Result):
        program = merged.program
    if example_inputs is None and program is not None:
        example_inputs = program.example_call
    if example_inputs is None:
        raise ArgumentError("example_inputs are needed to capture a model")
    network = merged.program if isinstance(merged, Result) else merged
    network = network if isinstance(network, Program) else trace(network, example_inputs)
    edges = _edges(references, example_inputs, network.outputs)
    if network.edges != 1:
        raise ArgumentError(f"the merged Program holds {network.edges} weight sets; run Interpolate first")
    if len(network.placeholders) != len(edges.placeholders):
        raise ArchitectureError(
            f"the merged network takes {len(network.placeholders)} inputs, its references {len(edges.placeholders)}"
        )
    return network, edges


def _edges(references: Any, example_inputs: Any, outputs: Sequence[int | str]) -> Program:
    if isinstance(references, Program):
        return references
    models = [references] if isinstance(references, nn.Module) else list(references)
    if not models:
        raise ArgumentError("references are empty; give the edges that were merged")
    return trace(models if len(models) > 1 else models[0], example_inputs, outputs=outputs or None)


def _align(
    edges: Program, merged: Any, match: Any, data: Any, limit: int | None, device: Any, seed: int, progress: bool
) -> tuple[Program, bool]:
    """The edges in the merged network's order of units, as far as it is known, and whether it is."""
    if match == "auto":
        given_matching = _matching(merged)
        if given_matching is None:
            return edges, True
        # linear maps act on folded networks, whose groups may have other numbers
        if len(given_matching.elements) != edges.edges or (not given_matching.is_exact and batch_norms(edges)):
            return edges, False
        return _aligned(edges, given_matching, seed), True
    finder = matcher(match)
    if finder is None or edges.edges < 2:
        return edges, True
    facts = symmetry(edges)
    statistics = None
    if finder.needs & {"features", "within"}:
        options: dict[str, Any] = {"max_samples": limit, "device": device, "progress": progress}
        statistics = collect(edges, facts, data, layers=False, within="within" in finder.needs, **options)
    reader = Batches(edges, data, limit, device)
    matching = finder(Problem(edges, facts, statistics, (), reader, seed, progress))
    return _aligned(edges, matching, seed), True


def _aligned(edges: Program, matching: Matching, seed: int) -> Program:
    facts = symmetry(edges)
    for edge, weights in enumerate(edges.weights):
        element = exact_part(matching.elements[edge])
        error = preserved(facts, weights, element, seed) if element else 0.0
        if not error <= PRESERVED:
            raise VerificationError(f"what reference {edge} was aligned by changes its function ({error:.1e})")
    return edges.with_weights([matching.aligned(facts, tensors, edge) for edge, tensors in enumerate(edges.weights)])


def _matching(merged: Any) -> Matching | None:
    """What a Result was merged with; nothing where its network was pruned."""
    return merged.report.matching if isinstance(merged, Result) and isinstance(merged.report, MergeReport) else None


def _notes(merged: Any, match: Any, aligned: bool) -> tuple[str, ...]:
    if not aligned:
        return ("the references' units do not stand in the merged network's order: silenced units are not counted",)
    if match == "auto" and not isinstance(merged, Result):
        return (
            "silenced units are counted as if the references' units stood in the merged network's order; if they do "
            "not, match='weight' or match='activation' aligns them",
        )
    return ()


def _reference(edges: Program, reference: Any) -> list[Tensor] | None:
    if reference is None:
        return None
    call = as_call(reference)
    return edges.signature.flatten(call.args, call.kwargs)


def _undefined(rows: Sequence[LayerRow]) -> tuple[str, ...]:
    names = [row.layer for row in rows if None in row.edge_offsets or (row.measured and row.offset is None)]
    if not names:
        return ()
    return (
        f"f(0) is not finite at {', '.join(names[:3])}: no features there; give reference=, an input to compare with",
    )


def _choices(merged: Any) -> dict[str, Any]:
    """What a merge has done already, where it is known; a pruned network has no edges to align."""
    if not isinstance(merged, Result) or "normalize" not in merged.report.choices:
        return {}
    done = {"normalize": merged.report.choices["normalize"]}
    return done | ({"aligned": merged.report.matching is not None} if isinstance(merged.report, MergeReport) else {})

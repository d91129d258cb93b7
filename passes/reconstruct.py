"""Reconstruct: every layer solved for what reference networks compute there, on calibration data.

For each layer in the order of the graph, with X the network's own inputs to it, all layers before it solved already,
and Y = Σ αᵢ yᵢ what the references give on the same samples (PLeaS, Nasery et al. 2025, §4.2; SparseGPT and ALPS
solve the same problem within a mask):

    W = argmin ‖X W − Y‖² + λ ‖W − W₀‖²

The references are the aligned edges of a merge, the dense network of a pruned one, or any networks of which the
student's channels are known to be linear functions. A layer with a BatchNorm behind it is one map: the solution is
written back into both, and the running statistics become those of the data. With ``follow`` the first layers are
those of one edge, and the goals of the layers behind them the mean of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from vfx.alphas import edge_weights
from vfx.analyse.layers import number_layers
from vfx.arguments import checked
from vfx.errors import ArgumentError
from vfx.program import Program, readers_of
from vfx.reconstruct.logits import LogitUnit, logit_units
from vfx.reconstruct.plan import units_of
from vfx.reconstruct.references import Reference, References, unchanged
from vfx.reconstruct.sweep import Options, Solved, Sweep
from vfx.reconstruct.units import MatrixUnit, Unit
from vfx.rewrite import Pass, PassResult
from vfx.statistics.data import Batches

Goals = Literal["sum", "output"]
Centre = Literal["references", "own"]


class Reconstruct(Pass[tuple[Solved, ...]]):
    """Solve every layer of a network of one weight set for the mean of the ``references``' outputs.

    ``references``: the Program of the aligned edges (with ``weights``, their shares), or a list of ``Reference``.
    ``data``: calibration batches, no labels needed; all are read, up to ``max_samples``. ``follow``: the first layers
    (a number, or up to the end of a module) follow reference ``follow_edge`` alone: they are its own where nothing
    before them differs, and are solved for its outputs where something does. ``goals``: "sum" solves a layer whose
    output meets an add, whose other operand is known, for the references' sum; "output" for their outputs. ``ridge``:
    λ as a share of the mean square of a layer's inputs; None chooses it for each layer on held-out samples.
    ``centre``: W₀, the mean of the "references"' weights or the network's "own". ``masks``: by FQN, the entries that
    may differ from zero (True). ``rounds``: how often all layers are solved, each time from the last result.
    ``max_rows``: random rows of a batch and layer to read instead of all. ``memory_limit``: bytes of activations kept
    in memory; the rest waits on disk. The record of ``run`` lists the layers.
    Raises ArgumentError, DataError, PassError.

    Example: ``Reconstruct(aligned, loader)(Interpolate()(aligned))``.
    """

    weight_sets = "one"
    needs = (number_layers,)

    @checked
    def __init__(
        self,
        references: Program | Sequence[Reference],
        data: Any,
        *,
        weights: float | Sequence[float] | None = None,
        follow: int | str = 0,
        follow_edge: int = 0,
        goals: Goals = "sum",
        ridge: float | None = None,
        centre: Centre = "own",
        masks: Mapping[str, Tensor] | None = None,
        rounds: int = 1,
        max_samples: int | None = None,
        max_rows: int | None = None,
        memory_limit: int | None = None,
        device: Any = None,
        progress: bool = True,
    ):
        if isinstance(references, Program):
            shares = edge_weights(weights, references.edges)
            references = [Reference(references.select(i), share) for i, share in enumerate(shares)]
        self.references, self.data = list(references), data
        self.follow, self.follow_edge, self.goals, self.centre = follow, follow_edge, goals, centre
        self.masks, self.rounds = dict(masks or {}), rounds
        self.max_samples, self.device = max_samples, device
        self.options = Options(ridge, max_rows, memory_limit, progress)

    @torch.no_grad()
    def apply(self, program: Program) -> PassResult[tuple[Solved, ...]]:
        layers = number_layers(program)
        followed = layers.first(self.follow) if self.follow else frozenset()
        references = References(self.references, followed, self.follow_edge)
        weights = dict(program.weights[0])
        units, notes = units_of(program, references.names, self.goals == "sum")
        if followed:
            if self.references[self.follow_edge].carry is not unchanged:
                raise ArgumentError("follow= needs a reference whose channels stand in the network as they are")
            copied = self._copied(program, followed)
            weights |= copied
            if not self._differs(program, followed, copied):
                units = [unit for unit in units if not all(use.node.name in followed for use in unit.uses)]
        weights |= self._masked(weights)
        stages = self._with_logits(program, references, units)
        sweep = Sweep(program, weights, references, stages, self.options)
        batches = Batches(program, self.data, self.max_samples, self.device)
        solved: list[Solved] = []
        for _ in range(self.rounds if units else 0):
            centre = partial(self._centre, references, dict(weights))
            solved = sweep.run(batches, centre, self.masks)
        if self.options.max_rows is not None:
            notes.append(f"reconstruction: at most {self.options.max_rows:,} random rows of each batch were read")
        follows = f", following edge {self.follow_edge} up to layer {layers.number(self.follow)}" if followed else ""
        result = program.with_weights([weights], f"Reconstruct({len(units)} units{follows})")
        return PassResult(result.with_notes(notes), tuple(solved))

    def _copied(self, program: Program, followed: frozenset[str]) -> dict[str, Tensor]:
        """The followed edge's tensors of all that followed calls alone read."""
        tensors = self.references[self.follow_edge].program.weights[0]
        return {
            name: tensors[name]
            for name, readers in readers_of(program.graph).items()
            if followed.issuperset(x.name for x in readers) and name in tensors and name not in program.private
        }

    def _differs(self, program: Program, followed: frozenset[str], copied: Mapping[str, Tensor]) -> bool:
        """Whether the followed calls compute something else than the edge.

        That is so behind kept branches, and where they read what is read behind them, too (a tied embedding).
        """
        readers = readers_of(program.graph)
        read = {name for name in readers if any(reader.name in followed for reader in readers[name])}
        tensors, ours = self.references[self.follow_edge].program.weights[0], program.weights[0]
        left = (name for name in read - set(copied) if name in tensors)
        return bool(program.private) or any(not torch.equal(tensors[name], ours[name]) for name in left)

    def _masked(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The masked tensors, zero outside their masks whether they are solved or not."""
        unknown = set(self.masks) - set(weights)
        if unknown:
            raise ArgumentError(f"masks name {sorted(unknown)[0]!r}, which is no tensor of the network")
        return {name: weights[name] * mask.to(weights[name]) for name, mask in self.masks.items()}

    def _with_logits(self, program: Program, references: References, units: Sequence[Unit]) -> list[Unit | LogitUnit]:
        """The units with the attention calls whose heads lost inner channels in between, in the order of the graph."""
        if len(references.all) != 1:
            return list(units)
        layers = [unit for unit in units if isinstance(unit, MatrixUnit)]
        logits = logit_units(program, layers, references.all[0].program)
        position = {node: index for index, node in enumerate(program.graph.nodes)}
        return sorted([*units, *logits], key=lambda unit: position[unit.uses[0].node])

    def _centre(self, references: References, weights: dict[str, Tensor], unit: Unit) -> tuple[Tensor, Tensor | None]:
        if self.centre == "own":
            return unit.read(weights)
        shares = references.shares(unit.uses[0].node.name)
        parts = [(share, unit.read(r.program.weights[0])) for share, r in zip(shares, references.all) if share]
        matrix = sum(share * matrix for share, (matrix, _) in parts)
        biases = [share * bias for share, (_, bias) in parts if bias is not None]
        return matrix, sum(biases) if biases else None  # type: ignore[return-value]

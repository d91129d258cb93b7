"""The weights that pruning may remove: those of convolutions and linear layers, each tensor once.

Every layout is seen as one matrix (outputs, inputs, taps): rows are what an output sums over, inputs are what N:M
patterns run along, taps are the kernel's positions.

==================  ============================  ==================================
operator            weight                        matrix
==================  ============================  ==================================
linear              (out, in)                     (out, in, 1)
mm, matmul, addmm   (in, out)                     (out, in, 1)
convolution         (out, in / groups, *kernel)   (out, in / groups, ∏ kernel)
transposed          (in, out / groups, *kernel)   (out, in / groups, ∏ kernel)
==================  ============================  ==================================
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx

from vfx.analyse.layers import ancestors, descendants
from vfx.complex_numbers import parts_of
from vfx.errors import ArgumentError, listed
from vfx.operators import arguments, is_transposed, operator, operator_of
from vfx.program import Program

FIRST, HEAD = "first", "head"
NAMED = 8  # weights that a message names


@dataclass(frozen=True)
class Target:
    """One prunable weight: its FQN in the graph, all its names, its shape, and the calls that read it as a weight."""

    name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    nodes: tuple[fx.Node, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def matrix(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as (outputs, inputs, taps)."""
        node = self.nodes[0]
        if operator_of(node).multiplies:
            return tensor.T.unsqueeze(2)
        flat = tensor.reshape(*tensor.shape[:2], -1)
        if not is_transposed(node):
            return flat
        groups = groups_of(node)
        inputs, outputs, taps = flat.shape
        return flat.reshape(groups, inputs // groups, outputs, taps).transpose(1, 2).reshape(-1, inputs // groups, taps)

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """Outputs, inputs and taps."""
        outputs, inputs, taps = self.matrix(torch.empty(self.shape, device="meta")).shape
        return outputs, inputs, taps

    def restored(self, matrix: Tensor) -> Tensor:
        """The inverse of ``matrix``."""
        node = self.nodes[0]
        if operator_of(node).multiplies:
            return matrix.squeeze(2).T
        if not is_transposed(node):
            return matrix.reshape(self.shape)
        groups = groups_of(node)
        outputs, inputs, taps = matrix.shape
        blocks = matrix.reshape(groups, outputs // groups, inputs, taps).transpose(1, 2)
        return blocks.reshape(self.shape)

    def matches(self, pattern: str) -> bool:
        """Whether a glob fits one of the weight's names, or the name of a module that owns it."""
        return any(fnmatchcase(name, pattern) for own in self.names for name in (own, own.rpartition(".")[0]))


def groups_of(node: fx.Node) -> int:
    return int(arguments(node).get("groups") or 1)


def operands(node: fx.Node) -> tuple[Any, Any]:
    """What a layer's call reads: its input and its weight; (None, None) for any other call."""
    entry, a = operator_of(node), arguments(node)
    if entry.is_layer:
        return a["input"], a["weight"]
    return (a[entry.roles["input"]], a[entry.roles["weight"]]) if entry.multiplies else (None, None)


def find_targets(program: Program) -> tuple[tuple[Target, ...], tuple[str, ...]]:
    """The prunable weights in order of first use, and a note for each layer whose weight cannot be pruned."""
    calls: dict[str, list[fx.Node]] = {}
    notes: list[str] = []
    for node in program.graph.nodes:
        source, weight = operands(node)
        if not isinstance(weight, fx.Node) or not isinstance(source, fx.Node):
            continue
        if weight.op != "get_attr":
            if operator_of(node).is_layer and parts_of(weight) is None:
                notes.append(f"not pruned: the weight of {node.name} is computed by {weight.name}")
        elif _is_matrix(program, node, str(weight.target)):
            calls.setdefault(str(weight.target), []).append(node)
    parts = {str(held.target) for node in program.graph.nodes if (held := parts_of(node)) is not None}
    matrices = [name for name in program.names() if name in parts and program.weights[0][name].ndim > 2]
    if matrices:
        notes.append(f"not pruned, since they are complex: {listed(matrices, NAMED)}")
    known = calls.keys() | parts
    others = [name for name in program.names() if name not in known and _is_parameter(program, name)]
    if others:
        notes.append(f"not pruned, since no convolution or linear layer reads them: {listed(others, NAMED)}")
    return tuple(_target(program, name, nodes) for name, nodes in calls.items()), tuple(notes)


def _is_matrix(program: Program, node: fx.Node, name: str) -> bool:
    return _is_parameter(program, name) and (operator_of(node).is_layer or program.weights[0][name].ndim == 2)


def _is_parameter(program: Program, name: str) -> bool:
    """Whether a tensor is trained and has rows; biases and norms are not worth pruning."""
    return program.is_parameter(name) and program.weights[0][name].ndim > 1


def _target(program: Program, name: str, nodes: list[fx.Node]) -> Target:
    names = (name, *(alias for alias, owner in program.aliases.items() if owner == name))
    kind = operator(nodes[0])  # a weight read in two layouts is seen in the first one
    same = tuple(node for node in nodes if operator(node) == kind and groups_of(node) == groups_of(nodes[0]))
    return Target(name, names, tuple(program.weights[0][name].shape), same)


def unprotected(targets: Sequence[Target], protect: Iterable[str]) -> tuple[Target, ...]:
    """The targets that no pattern protects: globs, "first" (layers that read the input) or "head" (the last ones).

    Raises ArgumentError for a pattern that matches nothing, and where nothing is left.
    """
    guarded: set[str] = set()
    for pattern in protect:
        special = {FIRST: _first, HEAD: heads}.get(pattern)
        found = special(targets) if special else {target.name for target in targets if target.matches(pattern)}
        if not found:
            raise nothing_matches("protect", pattern, targets)
        guarded |= found
    left = tuple(target for target in targets if target.name not in guarded)
    if not left:
        raise ArgumentError("there is nothing to prune: the network has no convolution or linear layer that is not "
                            f"protected ({len(guarded)} are)")  # fmt: skip
    return left


def by_pattern(targets: Sequence[Target], sparsity: Mapping[str, float]) -> list[tuple[tuple[Target, ...], float]]:
    """The targets of each pattern with its sparsity; the first pattern that fits a target has it."""
    left, found = list(targets), []
    for pattern, share in sparsity.items():
        if not any(target.matches(pattern) for target in targets):
            raise nothing_matches("sparsity", pattern, targets)
        chosen = tuple(target for target in left if target.matches(pattern))
        left = [target for target in left if target not in chosen]
        if chosen:
            found.append((chosen, share))
    return found


def nothing_matches(option: str, pattern: str, targets: Sequence[Target]) -> ArgumentError:
    known = listed([target.name for target in targets], NAMED)
    return ArgumentError(f"{option}: the pattern {pattern!r} matches no prunable weight; there are {known}")


def _first(targets: Sequence[Target]) -> set[str]:
    """Weights of layers that read the network's input before any other layer does."""
    layers = {node for target in targets for node in target.nodes}
    return {target.name for target in targets if any(_reads_input(node, layers) for node in target.nodes)}


def _reads_input(node: fx.Node, layers: set[fx.Node]) -> bool:
    source, _ = operands(node)
    before = ancestors([source])
    return not before & layers and any(one.op == "placeholder" for one in before)


def heads(targets: Sequence[Target]) -> set[str]:
    """Weights of layers behind which no other layer runs."""
    layers = {node for target in targets for node in target.nodes}
    return {target.name for target in targets if any(not descendants([node]) & layers for node in target.nodes)}

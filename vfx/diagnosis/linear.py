"""Exact decomposition of deep linear networks into feature and offset (*Vanishing Feature*, equations 2 and 3).

Without residuals, f(x) = W_L … W_1 x + Σ_j W_L … W_{j+1} b_j (eq. 2): the first term is the feature
g(x) = f(x) − f(0), the sum is the offset h = f(0). A residual layer is x ↦ x + W x + b. For a run of them the product
Π (I + W_j) is the sum of the elementary symmetric polynomials e_k: products of k of the matrices, later layers on the
left,

    e_k(M_1 … M_{n+1}) = M_{n+1} e_{k−1}(M_1 … M_n) + e_k(M_1 … M_n),   e_0 = I,

so feature and offsets fall apart by the number k of weights that they went through (eq. 3). The sum starts at k = 0:
the printed corollary for networks without a residual on the first layer leaves e_0 out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from vfx.errors import ArgumentError
from vfx.operators import arguments, operator, operator_of
from vfx.program import Program


@dataclass(frozen=True)
class LinearLayer:
    """x ↦ W x + b, or x + W x + b if ``residual``; ``weight`` (out, in), ``bias`` (out,) or None."""

    weight: Tensor
    bias: Tensor | None = None
    residual: bool = False


@dataclass(frozen=True)
class Decomposition:
    """f(x) = Σ_k features[k] + Σ_j Σ_k offsets[j][k], exactly.

    ``features[k]`` (N, out) went through k residual weights besides all plain ones; ``offsets[j][k]`` (out,) comes from
    the bias of layer j (from 0) in the same way.
    """

    features: tuple[Tensor, ...]
    offsets: tuple[tuple[Tensor, ...], ...]

    @property
    def feature(self) -> Tensor:
        """g(x) = f(x) − f(0), (N, out)."""
        return torch.stack(self.features).sum(0)

    @property
    def offset(self) -> Tensor:
        """h = f(0), (out,)."""
        return torch.stack([term for terms in self.offsets for term in terms]).sum(0)

    @property
    def output(self) -> Tensor:
        return self.feature + self.offset


def elementary_symmetric(matrices: Sequence[Tensor]) -> list[Tensor]:
    """e_0 … e_n of n square matrices (C, C): sums of products of k of them, later ones on the left."""
    if not matrices:
        raise ArgumentError("elementary symmetric polynomials need at least one matrix")
    polynomials = [torch.eye(len(matrices[0])).to(matrices[0])]
    for matrix in matrices:
        polynomials = _step(polynomials, matrix)
    return polynomials


def _step(polynomials: list[Tensor], matrix: Tensor) -> list[Tensor]:
    """e_k(…, M) = M e_{k−1}(…) + e_k(…) for every k; the operands may be matrices or what they were applied to."""
    kept = [*polynomials, torch.zeros_like(polynomials[0])]
    moved = [torch.zeros_like(polynomials[0]), *(matrix @ polynomial for polynomial in polynomials)]
    return [without + with_factor for without, with_factor in zip(kept, moved)]


def decompose(layers: Sequence[LinearLayer], x: Tensor) -> Decomposition:
    """Feature and offset terms of a linear network at inputs ``x`` (N, in). Raises ArgumentError on shapes."""
    if not layers:
        raise ArgumentError("a linear network needs at least one layer")
    for layer in layers:
        if layer.residual and layer.weight.shape[0] != layer.weight.shape[1]:
            raise ArgumentError(f"a residual layer needs a square weight, got {tuple(layer.weight.shape)}")
    features = _through(layers, x.T)
    biases = [x.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
    offsets = [_through(layers[j + 1 :], bias[:, None]) for j, bias in enumerate(biases)]
    return Decomposition(
        tuple(term.T for term in features), tuple(tuple(term[:, 0] for term in terms) for terms in offsets)
    )


def _through(layers: Sequence[LinearLayer], columns: Tensor) -> list[Tensor]:
    """The terms of order k = 0 … of the layers' product applied to columns (C, N)."""
    terms = [columns]
    for layer in layers:
        terms = _step(terms, layer.weight) if layer.residual else [layer.weight @ term for term in terms]
    return terms


def linear_layers(program: Program) -> list[LinearLayer]:
    """The layers of a Program that is a chain of linear layers, some with residuals; x enters the first flattened.

    Raises ArgumentError that names the operator which is none of these.
    """
    return list(_layers(program))


def _layers(program: Program) -> Iterator[LinearLayer]:
    weights, current = program.weights[0], program.placeholders[0]
    while True:
        users = [user for user in current.users if user.op != "output"]
        if not users:
            return
        linear = next((user for user in users if operator_of(user).is_linear), None)
        if linear is None or len(users) > 2:
            current = _view(users)
            continue
        tensors = arguments(linear)
        weight, bias = (_tensor(weights, tensors[name]) for name in ("weight", "bias"))
        assert weight is not None
        residual = len(users) == 2
        yield LinearLayer(weight, bias, residual)
        current = _sum(users, current, linear) if residual else linear


def _tensor(weights: object, node: object) -> Tensor | None:
    return weights[str(node.target)] if isinstance(node, fx.Node) else None  # type: ignore[index]


def _view(users: Iterable[fx.Node]) -> fx.Node:
    readers = list(users)
    if len(readers) == 1 and (operator_of(readers[0]).ties == "view" or operator_of(readers[0]).is_identity):
        return readers[0]
    names = ", ".join(f"{node.name} ({operator(node)})" for node in readers)
    raise ArgumentError(f"not a chain of linear layers: {names}; eq. 2 and 3 hold for linear networks only")


def _sum(users: Sequence[fx.Node], stream: fx.Node, linear: fx.Node) -> fx.Node:
    """The add of a residual layer."""
    add = next((user for user in users if user is not linear), None)
    plain = add is not None and operator_of(add).is_add and set(add.all_input_nodes) == {stream, linear}
    if add is None or not plain or list(linear.users) != [add] or add.kwargs.get("alpha", 1) != 1:
        raise ArgumentError(f"not a residual linear layer: {linear.name} and {getattr(add, 'name', None)}")
    return add

"""The Hessian of a layer's squared error, Σ x xᵀ over all that it reads, with the layer's weight as rows of it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vfx.errors import ArgumentError, PassError
from vfx.pruning.scores.score import Score, Subject
from vfx.pruning.scores.sequential import one_by_one
from vfx.pruning.selection import Selection
from vfx.pruning.targets import Target
from vfx.reconstruct.forms import Form, form_of


@dataclass(frozen=True)
class LayerProblem:
    """min ‖X W − X Ŵ‖² of one layer: ``hessian`` XᵀX (G, K, K) and the ``weight`` Ŵ (G, K, O), both float64.

    G counts the layer's independent groups, K what one of its outputs reads, O the outputs of a group.
    """

    form: Form
    hessian: Tensor
    weight: Tensor

    def damped(self, share: float) -> Tensor:
        """The Hessian with ``share`` of the mean of its diagonal added to it; the identity where no input varies."""
        result = self.hessian.clone()
        diagonal = result.diagonal(dim1=1, dim2=2)
        mean = diagonal.mean(1, keepdim=True)
        diagonal.add_(torch.where(mean > 0, share * mean, torch.ones_like(mean)))
        return result


def layer_problem(target: Target, weight: Tensor, values: list[Tensor]) -> LayerProblem:
    """The problem of a target's first call, from the call's inputs in all batches."""
    node = target.nodes[0]
    form_and_operands = form_of(node)
    if form_and_operands is None:
        raise PassError(f"the layer of {target.name!r} at {node.name} is no product of its input with that weight")
    form, hessian = form_and_operands[0], None
    for x in values:
        part = form.gram(x).double()
        hessian = part if hessian is None else hessian.add_(part)
    assert hessian is not None
    return LayerProblem(form, hessian, form.matrix(weight).double())


class LayerScore(Score):
    """A score that prunes each layer by its Hessian, on what the pruned layers before it give it."""

    needs_data: ClassVar[bool] = True
    scope: ClassVar[str] = "layer"
    protect: ClassVar[tuple[str, ...]] = ("head",)
    layer_by_layer = True

    @abstractmethod
    def layer_scores(self, problem: LayerProblem) -> Tensor:
        """A score for each weight of one layer, of the weight's shape."""

    def check(self, selection: Selection) -> None:
        if selection.scope == "global":
            raise ArgumentError(
                f"score={self.name!r} prunes layer by layer, and scope='global' compares all layers at once; choose "
                "scope 'layer', 'row' or a pattern such as 2:4"
            )

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """The scores of all layers on the network as it stands."""
        scores_of: dict[str, Tensor] = {}

        def look(target: Target, weight: Tensor, values: list[Tensor]) -> tuple[Tensor, Tensor]:
            scores_of[target.name] = self.layer_scores(layer_problem(target, weight, values))
            return torch.ones_like(weight, dtype=torch.bool), weight

        one_by_one(subject, look)
        return scores_of

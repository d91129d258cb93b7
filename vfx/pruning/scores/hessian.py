"""The Hessian of a layer's squared error, Σ x xᵀ over all that it reads, with the layer's weight as rows of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vfx.errors import PassError
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
    found = form_of(node)
    if found is None:
        raise PassError(f"the layer of {target.name!r} at {node.name} is no product of its input with that weight")
    form, hessian = found[0], None
    for x in values:
        part = form.gram(x).double()
        hessian = part if hessian is None else hessian.add_(part)
    assert hessian is not None
    return LayerProblem(form, hessian, form.matrix(weight).double())

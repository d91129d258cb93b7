"""Transform: linear maps found by a matching go into the weights behind the preserved layers.

Layers that make a feature become T W, layers that read it W U (ZipIt! §4, CCA merging §3, OT fusion §3). Preserved
branches are left alone: their maps stand on the join edge (DuplicateBranches), where they are exact; pushed into the
branch they would also reach the layers that read the feature unmapped.
"""

from __future__ import annotations

from dataclasses import replace

from vfx.elements import act
from vfx.program import Program
from vfx.rewrite import Pass, PassResult


class Transform(Pass[None]):
    """Put the maps of ``program.transport`` into each edge's weights; nothing to do where there are none."""

    weight_sets = "several"
    carries_maps = True

    def apply(self, program: Program) -> PassResult[None]:
        transport = program.transport
        if transport is None:
            return PassResult(program)
        weights = []
        for elements, tensors in zip(transport.elements, program.weights):
            shared = {name: tensor for name, tensor in tensors.items() if name not in program.private}
            weights.append({**tensors, **act(transport.symmetry, elements, shared)})
        count = len({group for elements in transport.elements for group in elements})
        return PassResult(replace(program.with_weights(weights, f"Transform({count} groups)"), transport=None))

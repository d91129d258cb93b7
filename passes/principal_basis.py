"""PrincipalBasis: features that any invertible map may go through, in the basis in which channels are spared best.

The classes say which features are free (queries and keys, values and output projection of each head, linear layers that
follow each other); data and the weights that read them say which directions matter (``vfx.pruning.principal``). The
network computes what it computed, its last channels the least that can be lost: removing channels then keeps as much as
the best factorization of that rank.
"""

from __future__ import annotations

from typing import Any

from vfx.analyse.symmetry import symmetry
from vfx.analyse.verify import preserved
from vfx.arguments import checked
from vfx.elements import act
from vfx.elements.element import Elements
from vfx.errors import VerificationError
from vfx.program import Program
from vfx.proof import PRESERVED
from vfx.pruning.principal import is_free, principal_elements
from vfx.pruning.second_moments import second_moments
from vfx.rewrite import Pass, PassResult


class PrincipalBasis(Pass[Elements]):
    """Turn the features of linear groups into their principal directions on ``data``, in one network."""

    weight_sets = "one"
    needs = (symmetry,)
    preserves_function = True
    changes_values = True

    @checked
    def __init__(
        self, data: Any, *, max_samples: int | None = None, device: Any = None, verify: bool = True,
        progress: bool = True,
    ):  # fmt: skip
        self.data, self.verify = data, verify
        self.options: dict[str, Any] = {"max_samples": max_samples, "device": device, "progress": progress}

    def apply(self, program: Program) -> PassResult[Elements]:
        facts = symmetry(program)
        if not any(is_free(group) for group in facts.moving):
            return PassResult(program, {})
        moments = second_moments(program, facts, self.data, **self.options)
        weights = program.weights[0]
        elements = principal_elements(facts, weights, moments)
        moved = act(facts, elements, weights)
        return PassResult(program.with_weights([moved], f"PrincipalBasis({len(elements)} groups)"), elements)

    def ensures(self, program: Program, result: PassResult[Any]) -> None:
        """Check in float64 that the maps found keep the function; found anew they would turn where directions tie."""
        if self.verify and result.record:
            error = preserved(symmetry(program), program.weights[0], result.record)
            if not error <= PRESERVED:
                raise VerificationError(f"{self.name} changed the function: relative error {error:.1e}")

"""Linear equations between exponents, solved as they come in.

A form Σ cᵢ vᵢ says by which powers of the free maps vᵢ a value is multiplied. Every operator that a map goes through
equates forms; each equation eliminates one variable, and what is left at the end is free. A variable that becomes zero
keeps the reason.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from fractions import Fraction

Form = Mapping[Hashable, Fraction]
UNIT: Form = {}


@dataclass(frozen=True)
class Reason:
    """Why no map can go through: the operator's node, and what it does."""

    node: str
    text: str

    def __str__(self) -> str:
        return f"{self.node} {self.text}"


def combine(left: Form, right: Form, factor: Fraction | int = 1) -> Form:
    """left + factor · right."""
    result = dict(left)
    for variable, coefficient in right.items():
        total = result.get(variable, Fraction(0)) + factor * coefficient
        if total:
            result[variable] = total
        else:
            result.pop(variable, None)
    return result


class Equations:
    """Variables, of which each equation eliminates one."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Form] = {}
        self._reasons: dict[Hashable, Reason] = {}

    def resolve(self, form: Form) -> Form:
        """A form in free variables alone."""
        while not self._known.keys().isdisjoint(form):
            variable = next(v for v in form if v in self._known)
            rest = {v: c for v, c in form.items() if v != variable}
            form = combine(rest, self._known[variable], form[variable])
        return form

    def equate(self, left: Form, right: Form, reason: Reason) -> None:
        """left = right; ``reason`` is told of what that makes zero, unless one side was zero before."""
        a, b = self.resolve(left), self.resolve(right)
        difference = combine(a, b, -1)
        if not difference:
            return
        pivot = next((v for v, c in difference.items() if abs(c) == 1), next(iter(difference)))
        rest = {v: -c / difference[pivot] for v, c in difference.items() if v != pivot}
        self._known[pivot] = rest
        if not rest:
            earlier = [self.reason(side) for side, found in ((left, a), (right, b)) if not found]
            self._reasons[pivot] = next((r for r in earlier if r is not None), reason)

    def reason(self, form: Form) -> Reason | None:
        """Why a form is zero: the reason of the first of its variables that has one."""
        stack, seen = list(form), set()
        while stack:
            variable = stack.pop(0)
            if variable in self._reasons:
                return self._reasons[variable]
            if variable not in seen:
                seen.add(variable)
                stack += self._known.get(variable, {})
        return None

"""Freedom: type inference for maps of channels, beside permutations.

The symmetry's groups say which axes hold the same channels. Here every value carries, for each axis and group, the
map that its channels may be multiplied by, written additively as a form over unknown exponents (``equations``): a
scale that multiplies what a layer writes is +1, what undoes it in the layer that reads the feature is −1. Each
operator's rule (``transfer``) equates forms or says why no map goes through; an operator without a rule fixes all
that it reads. So a map that is left free is one that every operator commutes with, whatever the architecture. Three
kinds of maps:

* ``POSITIVE``: positive scales of channels; go through positively homogeneous functions (ReLU, max-pool);
* ``DIAGONAL``: any scales, zero among them: linear operators only;
* ``DENSE``: matrices that act on the whole axis (centring x − mean x): linear operators on *other* axes, residual sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from functools import cached_property
from typing import Any

from torch import fx

from vfx.analyse.rules import HARMLESS
from vfx.analyse.symmetry import Index, Symmetry
from vfx.freedom.equations import UNIT, Equations, Form, Reason, combine
from vfx.freedom.transfer import TABLE
from vfx.operators import arguments, operator
from vfx.program import Value


class MapKind(Enum):
    """The kind of maps that are asked for."""

    POSITIVE = "positive"
    DIAGONAL = "diagonal"
    DENSE = "dense"


@dataclass(frozen=True)
class Member:
    """A parameter axis that a free map moves: to the power of ``exponent``, at ``position`` (size, copies) along it."""

    fqn: str
    dim: int
    exponent: Fraction
    position: Index


@dataclass(frozen=True)
class Normed:
    """A LayerNorm or RMSNorm that normalises one group's whole axis, and the form of what it reads."""

    node: fx.Node
    group: int
    form: Form


class Freedom:
    """The free maps of a network's channels; ``variables`` are theirs, each acting on one group of the symmetry."""

    def __init__(self, symmetry: Symmetry, kind: MapKind):
        self.symmetry, self.kind = symmetry, kind
        self.equations = Equations()
        self.norms: list[Normed] = []
        self._forms: dict[tuple[fx.Node, int], dict[int, Form]] = {}
        self._groups: dict[tuple[fx.Node, int], frozenset[int]] = {}
        for node in symmetry.program.graph.nodes:
            self._visit(node)

    # what was found -----------------------------------------------------------------------------------------------

    def form(self, fqn: str, dim: int, group: int) -> Form:
        """The exponents of a parameter's axis, in free variables."""
        return self.equations.resolve({(fqn, dim, group): Fraction(1)})

    def reason(self, fqn: str, dim: int, group: int) -> Reason | None:
        """Why a parameter's axis admits no map."""
        return self.equations.reason({(fqn, dim, group): Fraction(1)})

    @cached_property
    def variables(self) -> dict[Any, list[Member]]:
        """Each free variable with the parameter axes that it moves."""
        found: dict[Any, list[Member]] = {}
        for group in self.symmetry.groups:
            for member in group.members:
                if (member.fqn, member.dim, group.index) not in self._read:
                    continue
                for variable, exponent in self.form(member.fqn, member.dim, group.index).items():
                    own = Member(member.fqn, member.dim, exponent, member.position)
                    found.setdefault(variable, []).append(own)
        return found

    @cached_property
    def _read(self) -> set[Any]:
        """The parameter axes that operators read as values or weights, with a map on them."""
        return {
            (str(node.target), dim, group)
            for (node, dim), forms in self._forms.items()
            if node.op == "get_attr"
            for group in forms
        }

    # for rules ----------------------------------------------------------------------------------------------------

    def rank(self, node: fx.Node) -> int:
        value = node.meta.get("val")
        return len(value.shape) if isinstance(value, Value) else 0

    def size(self, node: fx.Node, dim: int) -> Any:
        return node.meta["val"].shape[dim]

    def groups(self, node: fx.Node, dim: int) -> frozenset[int]:
        """The groups whose channels stand alone along an axis (no other group moves the same positions)."""
        key = node, dim
        if key not in self._groups:
            labels = self.symmetry.labels(node, dim) if self.rank(node) else None
            features = [] if labels is None else self.symmetry.features(labels)
            together = {group for groups, _, _ in features if len(groups) > 1 for group in groups}
            alone = {group for groups, _, _ in features for group in groups}
            self._groups[key] = frozenset(alone - together)
        return self._groups[key]

    def copies(self, node: fx.Node, dim: int, group: int) -> int:
        """How often an axis holds one group's channels; 0 if it holds anything else as well."""
        found = self.symmetry.positions(node, dim).get(group)
        whole = self.groups(node, dim) == {group} and found is not None and found.size == self.size(node, dim)
        return found.shape[1] if whole and found is not None else 0

    def get(self, node: Any, dim: int, group: int) -> Form:
        """The form of one group's channels along an axis of a value."""
        return self._forms.get((node, dim), {}).get(group, UNIT) if isinstance(node, fx.Node) else UNIT

    def put(self, node: fx.Node, dim: int, group: int, form: Form) -> None:
        self._forms.setdefault((node, dim), {})[group] = form

    def carried(self, node: Any) -> Iterator[tuple[int, int, Form]]:
        """(dim, group, form) of all that a value carries."""
        for dim in range(self.rank(node)) if isinstance(node, fx.Node) else ():
            for group, form in self._forms.get((node, dim), {}).items():
                yield dim, group, form

    def equate(self, left: Form, right: Form, node: fx.Node, text: str) -> None:
        self.equations.equate(left, right, Reason(node.name, text))

    def fix(self, value: Any, node: fx.Node, text: str, dims: Any = None) -> None:
        """No map goes on from the axes ``dims`` (default: all) of a value."""
        for dim, _, form in list(self.carried(value)):
            if dims is None or dim in dims:
                self.equate(form, UNIT, node, text)

    def absorb(self, x: Any, dim: int, weight: Any, other: int, node: fx.Node) -> None:
        """A sum over an axis of x and one of a weight: the weight undoes what x is multiplied by."""
        for group in self._on(x, dim) | self._on(weight, other):
            both = combine(self.get(x, dim, group), self.get(weight, other, group))
            name = weight.target if isinstance(weight, fx.Node) and weight.op == "get_attr" else "another value"
            self.equate(both, UNIT, node, f"multiplies it with {name}, which cannot undo a map")

    def _on(self, node: Any, dim: int) -> set[int]:
        return set(self._forms.get((node, dim), {}))

    # traversal ----------------------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            self._attribute(node)
        elif node.op == "output":
            for value in node.all_input_nodes:
                self.fix(value, node, "leaves the network")
        elif node.op == "call_function":
            self._call(node)

    def _call(self, node: fx.Node) -> None:
        name = operator(node)
        if name in HARMLESS:
            return
        rule = TABLE.get(name)
        if rule is None or not rule(self, node, arguments(node)):
            for value in node.all_input_nodes:
                self.fix(value, node, f"({name}) does not commute with it")
        for dim in range(self.rank(node)):  # what carries no map says where it comes from
            for group in self.groups(node, dim) - set(self._forms.get((node, dim), {})):
                form: Form = {("value", node.name, dim, group): Fraction(1)}
                self.put(node, dim, group, form)
                self.equate(form, UNIT, node, f"({name}) writes it")

    def _attribute(self, node: fx.Node) -> None:
        fqn = str(node.target)
        if fqn in self.symmetry.program.buffers:
            return
        for dim in range(self.rank(node)):
            for group in self.groups(node, dim):
                self.put(node, dim, group, {(fqn, dim, group): Fraction(1)})

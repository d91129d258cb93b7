"""Every operator of the registry: aliases are one operator, and a class that is one step too large is noticed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from micro_models import net
from test_classes import CASES, COVERS, Case
from torch import Tensor, fx, nn

from vfx.analyse.action import HANDLERS, pointwise
from vfx.analyse.classes import Maps
from vfx.analyse.slots import Lowering, Slots
from vfx.analyse.symmetry import Symmetry, symmetry
from vfx.analyse.verify import verify
from vfx.capture.capture import capture
from vfx.operators import PERMUTATION, REGISTRY, Operator, arguments, defaults, operator, operator_of
from vfx.program import Program

P, S, A, M = Maps.PERMUTATION, Maps.SIGNED, Maps.POSITIVE_MONOMIAL, Maps.MONOMIAL
L = Maps.LINEAR
LARGER = {P: (S, A), S: (M,), A: (M,), M: (L,), L: ()}
EXACT, NOTICED = 1e-10, 1e-7


# aliases ------------------------------------------------------------------------------------------------------------


def documented() -> Iterator[tuple[str, str]]:
    """(alias, name) of every ATen operator that torch's own documentation calls an alias of another."""
    for module, prefix in ((torch, ""), (torch.special, "special_"), (torch.linalg, "linalg_"), (torch.Tensor, "")):
        for own in dir(module):
            text = getattr(getattr(module, own), "__doc__", None)
            match = re.search(r"[Aa]lias (?:for|of) :(?:func|meth):`~?(?:torch\.)?([\w.]+)`", str(text))
            if match is None:
                continue
            other = match.group(1).removeprefix("nn.functional.").removeprefix("Tensor.").replace(".", "_")
            if own != other and hasattr(torch.ops.aten, prefix + own) and hasattr(torch.ops.aten, other):
                yield prefix + own, other


def overloads(name: str) -> list[Any]:
    packet = getattr(torch.ops.aten, name)
    return [getattr(packet, own) for own in packet.overloads()]


def called(target: Any) -> str:
    """What an operator is called in the registry."""
    graph = torch.fx.Graph()
    return operator(graph.call_function(target, ()))


def test_documented_aliases_have_one_name() -> None:
    known = {name.removeprefix("aten.") for name in REGISTRY}
    pairs = [(a, b) for a, b in documented() if {called(overloads(n)[0])[5:].rstrip("_") for n in (a, b)} & known]
    assert len(pairs) > 40
    for alias, name in pairs:
        assert called(overloads(alias)[0]) == called(overloads(name)[0]), (alias, name)


ALIASES = {alias: entry.name for entry in REGISTRY.values() for alias in entry.names[1:] if alias.count(".") == 1}


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_an_alias_takes_the_arguments_of_its_operator(alias: str) -> None:
    known = [set(defaults(target) or ()) for target in overloads(ALIASES[alias].removeprefix("aten."))]
    for target in overloads(alias.removeprefix("aten.")):
        assert any(set(defaults(target) or ()) - {"decimals", "out"} <= own for own in known), target


def test_extremes_of_two_tensors_are_no_reductions() -> None:
    assert called(torch.ops.aten.max.other) == called(torch.ops.aten.maximum.default) == "aten.maximum"
    assert called(torch.ops.aten.min.other) == called(torch.ops.aten.minimum.default)
    assert called(torch.ops.aten.max.dim) == "aten.max" != called(torch.ops.aten.amax.default)


# networks -----------------------------------------------------------------------------------------------------------

POSITIVE = [
    "log",
    "log1p",
    "log2",
    "log10",
    "sqrt",
    "rsqrt",
    "lgamma",
    "digamma",
    "special_entr",
    "igamma",
    "igammac",
    "xlogy",
    "special_xlog1py",
    *(f"special_{name}" for name in ("bessel_y0", "bessel_y1", "modified_bessel_k0", "modified_bessel_k1")),
    *(f"special_scaled_modified_bessel_k{order}" for order in (0, 1)),
]
BETWEEN = ["asin", "acos", "atanh", "erfinv"]  # arguments from −1 to 1
GIVEN: dict[str, tuple[Any, ...]] = {
    "lerp": (0.3,), "clamp": (-0.2, 0.7), "clamp_min": (0.3,), "clamp_max": (0.3,), "pow": (3,), "float_power": (3,),
    "threshold": (0.2, -0.1), "mvlgamma": (1,), "logit": (1e-3,), "ldexp": (),
}  # fmt: skip
BEFORE: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(POSITIVE, torch.abs), **dict.fromkeys(BETWEEN, torch.tanh),
    **dict.fromkeys(["logit", "special_ndtri"], torch.sigmoid), "special_zeta": lambda h: h.abs() + 1.5,
    "acosh": lambda h: h.abs() + 1, "mvlgamma": lambda h: h.abs() + 1,
}  # fmt: skip
UNSEEN = {  # a class larger than theirs is true as far as finite values and float64 show
    "remainder", "fmod", "copysign", "nextafter", "nan_to_num", "rrelu",
}  # fmt: skip


def _function(name: str) -> Callable[[Tensor, Tensor], Tensor] | None:
    """An operator of one or two floating tensors as a function of two; None where it takes or gives others."""
    packet = getattr(torch.ops.aten, name)
    x, y = torch.rand(3, 4) * 0.5 + 0.2, torch.rand(3, 4) * 0.5 + 0.2
    before, given = BEFORE.get(name, lambda h: h), GIVEN.get(name, ())
    for function in (
        lambda a, b: packet(before(a), *given) + 0 * b,
        lambda a, b: packet(before(a), before(b), *given),
    ):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = function(x, y)
        except (RuntimeError, TypeError, NotImplementedError):
            continue
        if isinstance(value, Tensor) and value.shape == x.shape and value.dtype == x.dtype:
            return function
    return None


FUNCTIONS = {
    name: function
    for name in sorted(name.removeprefix("aten.") for name, entry in REGISTRY.items() if entry.is_elementwise)
    if hasattr(torch.ops.aten, name) and (function := _function(name)) is not None
}


def _traced(function: Callable[[Tensor, Tensor], Tensor]) -> Program:
    torch.manual_seed(0)
    model = net(lambda s, x: s.c(function(s.a(x), s.b(x))), a=nn.Linear(5, 12), b=nn.Linear(5, 12), c=nn.Linear(12, 3))
    return capture(model.eval(), (torch.randn(6, 5),))


def _kinds(facts: Symmetry) -> list[Maps]:
    return [group.kind for group in facts.groups]


def test_nearly_all_pointwise_operators_are_tried() -> None:
    rows = [entry for entry in REGISTRY.values() if entry.is_elementwise]
    assert len(FUNCTIONS) > 70
    assert {"relu6", "hardtanh", "softplus", "maximum", "erf", "clamp", "threshold", "hardswish"} <= set(FUNCTIONS)
    assert len(FUNCTIONS) > len(rows) / 2


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_a_pointwise_class_one_step_too_large_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, own = _traced(FUNCTIONS[name]), REGISTRY[f"aten.{name}"]
    facts = symmetry(program)
    assert not facts.unknown_ops
    assert verify(facts) <= EXACT
    said = {maps for node in program.graph.nodes if (maps := _said(node, own)) is not None}
    for wrong in {larger for maps in said for larger in LARGER[maps]} if name not in UNSEEN else ():
        monkeypatch.setitem(pointwise._MAPS, "wrong", wrong)
        monkeypatch.setitem(HANDLERS, "wrong", pointwise.mapped)
        monkeypatch.setitem(REGISTRY, own.name, replace(own, classes="wrong"))
        loosened = symmetry(program)
        if _kinds(loosened) != _kinds(facts):
            assert max(verify(loosened, seed) for seed in range(2)) >= NOTICED, wrong


def _said(node: fx.Node, entry: Operator) -> Maps | None:
    """The class of a function of one kind of map; None for sums, products and powers."""
    given = entry.classes in {*pointwise._MAPS, "clamp", PERMUTATION}
    return pointwise._allowed(entry, arguments(node)) if given and operator_of(node) is entry else None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_handler_that_lowers_one_step_too_little_is_noticed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    program = capture(case.build().eval(), case.inputs())
    facts = symmetry(program)
    asked = {(lowering.node, lowering.maps) for group in facts.groups for lowering in _lowered(facts, group.index)}
    for node, maps in sorted(asked):
        for wrong in COVERS[maps]:
            with monkeypatch.context() as patch:
                patch.setattr(Slots, "lower", _lowering(node, maps, wrong))
                loosened = symmetry(program)
                grown = _kinds(loosened) != _kinds(facts)
            if grown:
                assert max(verify(loosened, seed) for seed in range(2)) >= NOTICED, (node, maps, wrong)


def _lowering(node: str, maps: Maps, wrong: Maps) -> Callable[[Slots, int, Maps], None]:
    """``Slots.lower`` with a larger class wherever a node asks for one."""
    lower = Slots.lower
    return lambda slots, slot, own: lower(slots, slot, wrong if (slots.context, own) == (node, maps) else own)


def _lowered(facts: Symmetry, index: int) -> list[Lowering]:
    """What nodes of the graph asked of a group's sides."""
    slots = facts.classes._inferred.slots
    sides = [side.index for side in facts.group(index).sides]
    return [
        lowering
        for side in sides
        for lowering in slots.lowered.get(side, ())
        if lowering.node in facts.classes._inferred.nodes
    ]

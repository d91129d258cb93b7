"""Each operator of the registry in a tiny network of its own: its class is proved, it is costed and resized."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from operator_networks import Called, network_of
from test_resize import _drawn

from vfx.analyse.cost import cost
from vfx.analyse.symmetry import Symmetry, symmetry
from vfx.capture import capture
from vfx.errors import PassError
from vfx.operators import REGISTRY, UNKNOWN, Operator, operator_of
from vfx.program import Program
from vfx.resize import Slots, resize
from vfx.resize.masked import masked_error

EXACT = 1e-10
MADE = {entry.name: model for entry in REGISTRY.values() if (model := network_of(entry)) is not None}
# what the capture takes away or folds, and what gives other numbers each time
GONE = {"fill", "ordered", "ordered like", "item", "sizes", "number"}
# forms that no rule covers: an output beside the result is read, a sorted sequence has several axes
NOT_COVERED = """
    searchsorted _scaled_dot_product_attention_math _scaled_dot_product_flash_attention_for_cpu native_layer_norm
    _fused_rms_norm native_group_norm _weight_norm_interface
"""


@cache
def _program(name: str) -> Program:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operators that will be gone one day
        return capture(MADE[name].double(), (torch.randn(2, 1, dtype=torch.float64),))


def _tried() -> list[str]:
    return [name for name in MADE if REGISTRY[name].ties not in GONE]


def _is_called(entry: Operator, program: Program) -> bool:
    return any(operator_of(node) is entry for node in program.graph.nodes)


def test_most_operators_have_a_network() -> None:
    called = [entry for entry in REGISTRY.values() if entry.name.startswith("aten.") and entry.ties not in GONE]
    assert len(_tried()) > 330
    assert len(_tried()) > 0.8 * len(called)
    assert all(isinstance(model, Called) for model in MADE.values())


@pytest.mark.parametrize("name", _tried())
def test_its_class_is_proved_and_it_is_costed_and_resized(name: str) -> None:
    entry, program = REGISTRY[name], _program(name)
    if not _is_called(entry, program):
        assert entry.is_input or name.startswith("aten.lift_fresh")  # the capture takes it away
        return
    facts = symmetry(program)
    assert facts.verify() <= EXACT
    assert bool(facts.unknown_ops) == (not entry.is_known or name.removeprefix("aten.") in NOT_COVERED.split())
    assert (name in cost(program).unknown_ops) == (entry.cost == UNKNOWN)
    assert _resized_error(program, facts) <= EXACT


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("aten.relu", {"classes": "odd"}),
        ("aten.gelu", {"classes": "positive"}),
        ("aten.layer_norm", {"classes": "per channel"}),
        ("aten.amax", {"classes": "total"}),
        ("aten.cumsum", {"ties": "softmax"}),
        ("aten.flip", {"ties": "same"}),
        ("aten.logsumexp", {"reads_all": False}),
        ("aten.softmax", {"reads_all": False}),
    ],
)
def test_a_wrong_entry_is_noticed(name: str, wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    program = _program(name)
    monkeypatch.setitem(REGISTRY, name, replace(REGISTRY[name], **wrong))
    facts = symmetry(program)
    assert max(facts.verify(), _resized_error(program, facts)) > 1e-6


def _resized_error(program: Program, facts: Symmetry) -> float:
    """How a network of half the channels differs from the masked one; 0 where resizing is refused."""
    slots = Slots(facts)
    kept = _drawn(facts, slots, 0.5)
    try:
        small = resize(program, facts, kept, slots=slots)
    except PassError:
        return 0.0
    return masked_error(program, facts, small, kept)

"""Each operator of the registry in a tiny network of its own: its class is proved, it is costed and resized."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from micro_models import net
from operator_networks import Called, network_of
from test_resize import _drawn
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from vfx.analyse.cost import cost
from vfx.analyse.symmetry import Symmetry, symmetry
from vfx.analyse.verify import verify
from vfx.capture.capture import capture
from vfx.errors import PassError
from vfx.operators import REGISTRY, UNKNOWN, Operator, operator_of
from vfx.program import Facts, Program
from vfx.resize import RemovalUnits, resize
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
    assert verify(facts) <= EXACT
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
    facts = symmetry(replace(program, facts=Facts(program.graph)))  # what was found by the right entry is forgotten
    assert max(verify(facts), _resized_error(program, facts)) > 1e-6


# operators between layers: which widths may be permuted, whatever they do to positions --------------------------------


def _pooled_and_back(s: Any, x: Tensor) -> Tensor:
    values, places = F.max_pool2d(s.a(x).relu(), 2, return_indices=True)
    return s.c(F.max_unpool2d(values, places, 2)).sum((2, 3))


def _spectrum(s: Any, x: Tensor) -> Tensor:
    return s.c(torch.fft.rfft2(s.a(x), dim=(-2, -1)).abs()).sum((2, 3))


def _deformed(s: Any, x: Tensor) -> Tensor:
    h = s.a(x).relu()
    return s.c(deform_conv2d(h, s.offset(x), s.w, padding=1)).sum((2, 3))


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


BETWEEN: dict[str, tuple[Callable[[], nn.Module], list[int]]] = {
    "max_unpool2d": (lambda: net(_pooled_and_back, a=_conv(3, 8), c=_conv(8, 2)), [8]),
    "rfft2": (lambda: net(_spectrum, a=_conv(3, 8), c=_conv(8, 2)), [8]),
    "deform_conv2d": (
        lambda: net(_deformed, a=_conv(3, 8), offset=_conv(3, 18), c=_conv(6, 2),
                    w=nn.Parameter(torch.randn(6, 8, 3, 3))),
        [6, 8],
    ),
    "multi_dot": (
        lambda: net(
            lambda s, x: x.mean((2, 3)) @ torch.linalg.multi_dot([s.u, s.v, s.w]),
            u=nn.Parameter(torch.randn(3, 7)), v=nn.Parameter(torch.randn(7, 5)), w=nn.Parameter(torch.randn(5, 2)),
        ),
        [5, 7],
    ),
    "vecdot": (
        lambda: net(lambda s, x: torch.linalg.vecdot(s.a(x.mean((2, 3))), s.c(x.amax((2, 3))))[:, None],
                    a=nn.Linear(3, 6), c=nn.Linear(3, 6)),
        [6],
    ),
    "hsplit": (
        lambda: net(lambda s, x: s.c(torch.mul(*torch.hsplit(s.a(x.mean((2, 3))), 2))),
                    a=nn.Linear(3, 12), c=nn.Linear(6, 2)),
        [6],
    ),
    "fliplr": (
        lambda: net(lambda s, x: s.c(torch.fliplr(s.a(x.mean((2, 3)))).tanh()), a=nn.Linear(3, 6), c=nn.Linear(6, 2)),
        [6],
    ),
    "atleast": (
        lambda: net(lambda s, x: s.c(torch.atleast_3d(s.a(x.mean((2, 3))) + torch.atleast_2d(s.w))[..., 0].tanh()),
                    a=nn.Linear(3, 6), c=nn.Linear(6, 2), w=nn.Parameter(torch.randn(6))),
        [6],
    ),
    "huber": (
        lambda: net(lambda s, x: x.mean((1, 2, 3))[:, None] * F.huber_loss(s.p, s.q),
                    p=nn.Parameter(torch.randn(6)), q=nn.Parameter(torch.randn(6))),
        [6],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BETWEEN)
def test_channels_pass_operators_on_positions(name: str) -> None:
    torch.manual_seed(0)
    build, sizes = BETWEEN[name]
    program = capture(build().eval().double(), (torch.randn(2, 3, 8, 8, dtype=torch.float64),))
    facts = symmetry(program)
    assert not facts.unknown_ops
    assert sorted(group.size for group in facts.groups) == sizes
    assert verify(facts) <= EXACT
    assert _resized_error(program, facts) <= EXACT


def _resized_error(program: Program, facts: Symmetry) -> float:
    """How a network of half the channels differs from the masked one; 0 where resizing is refused."""
    slots = RemovalUnits(facts)
    kept = _drawn(facts, slots, 0.5)
    try:
        small = resize(program, facts, kept, slots=slots)
    except PassError:
        return 0.0
    return masked_error(program, facts, small, kept)

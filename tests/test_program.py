"""Running a Program: elementwise operators reuse dying operands, and nobody can tell."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from micro_models import MICRO, Micro, conv, net
from torch import Tensor, nn

from vfx.api import trace
from vfx.capture.capture import capture
from vfx.program import run, schedule


@pytest.mark.parametrize("micro", MICRO, ids=lambda micro: micro.name)
def test_results_and_operands_are_the_same_with_and_without_reuse(micro: Micro) -> None:
    """With gradients on, every operator makes a new tensor; without, some write into an operand."""
    torch.manual_seed(0)
    program = capture(micro.build().eval(), micro.inputs())
    inputs = list(program.example_inputs)
    before = copy.deepcopy((inputs, program.weights[0]))
    with torch.enable_grad():
        expected = run(program.graph, program.weights[0], inputs)
    with torch.no_grad():
        found = run(program.graph, program.weights[0], inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close((inputs, dict(program.weights[0])), (before[0], dict(before[1])), rtol=0, atol=0)


def _reused(module: nn.Module) -> list[str]:
    graph = trace(module.eval(), torch.randn(2, 3, 4, 4)).graph
    return [step.node.name for step in schedule(graph) if step.in_place is not None]


def test_what_is_read_again_viewed_broadcast_or_given_is_never_written_to() -> None:
    def block(self: nn.Module, x: Tensor) -> Tensor:
        y = self.norm(self.a(x))
        return (F.relu(y) + y).mean((2, 3))

    assert _reused(net(block, a=conv(3, 4), norm=nn.BatchNorm2d(4))) == ["add"]  # into relu's result, not into y
    assert _reused(net(lambda self, x: F.relu(x) + self.a(x), a=conv(3, 3))) == ["add"]  # x itself is the caller's
    viewed = net(lambda self, x: F.relu((y := self.a(x)).flatten(1)).sum() + y.sum(), a=conv(3, 4))
    assert "relu" not in _reused(viewed)
    narrow = net(lambda self, x: self.a(x) + x.new_ones(1, 4, 4, 4), a=nn.Conv2d(3, 4, 4))
    assert _reused(narrow) == []  # the sum is larger than its operand
    chain = net(lambda self, x: torch.sigmoid(F.relu(self.a(x))), a=conv(3, 4))
    assert _reused(chain) == ["relu", "sigmoid"]

"""Activation matching leaves the signs of norm gains where they do not cancel in the average."""

import numpy as np
import pytest
import torch
from conftest import edges, images

from vfx.api import collect, symmetry, trace
from vfx.elements import act, random_element
from vfx.match.activation import ActivationMatching
from vfx.match.matcher import Matching, Problem
from vfx.models import vit_tiny
from vfx.program import Program

X = images(64, 8, 1, dtype=torch.float64)


def _matched(program: Program) -> tuple[Matching, dict[str, torch.Tensor]]:
    statistics = collect(program, data=X, progress=False)
    facts = symmetry(program)
    found = ActivationMatching()(Problem(program, facts, statistics))
    return found, act(facts, found.elements[1], program.weights[1])


def _program() -> Program:
    return trace(edges(lambda: vit_tiny(width=1 / 16, in_channels=1, size=8, depth=2), X), X[:2])


def _gains(program: Program) -> list[str]:
    return [name for name in program.weights[0] if "norm" in name and name.endswith("weight")]


def test_gains_of_one_sign_keep_it() -> None:
    program = _program()
    _, aligned = _matched(program)
    assert len(_gains(program)) == 5
    for name in _gains(program):
        assert (program.weights[0][name] > 0).all()
        assert (aligned[name] > 0).all(), name


def test_a_network_whose_gains_were_negated_is_given_back() -> None:
    program, generator = _program(), np.random.default_rng(0)
    facts = symmetry(program)
    moved = act(facts, random_element(facts, generator), program.weights[0])
    assert any((moved[name] < 0).any() for name in _gains(program))
    _, aligned = _matched(program.with_weights([program.weights[0], moved], "moved"))
    for name, tensor in program.weights[0].items():
        assert aligned[name].numpy() == pytest.approx(tensor.numpy(), abs=1e-6), name

"""What the proof of all rewrites notices: every value of every output, at every scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from micro_models import net
from torch import Tensor, nn
from torch.nn import functional as F

from vfx.api import trace
from vfx.program import Program, run
from vfx.proof import PRESERVED, error_to_size, function_error, outputs_error, random_inputs, same_function, trials

INF, NAN = float("inf"), float("nan")
A, B = torch.tensor([1.0, 2.0]).double(), torch.tensor([3.0, 5.0]).double()


def _layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"a": nn.Linear(5, 8), "b": nn.Linear(8, 3)}


def _program(between: Callable[[Tensor], Tensor] = torch.relu, samples: int = 4) -> Program:
    model = net(lambda s, x: {"y": s.b(between(s.a(x))), "z": s.a(x)}, **_layers()).double().eval()
    return trace(model, torch.rand(samples, 5).double())


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"a": A, "b": B}, 0.0),
        ({"a": A, "b": torch.tensor([3.0, NAN]).double()}, INF),
        ({"a": A, "b": torch.tensor([3.0, INF]).double()}, INF),
        ({"a": A, "b": B[:1]}, INF),
        ({"a": A, "b": B[None]}, INF),  # broadcasts
        ({"a": A, "b": B.float()}, INF),
        ({"a": A, "b": B.long()}, INF),
        ({"a": A, "b": B.to(torch.complex128)}, INF),
        ({"a": A}, INF),
        ({"a": A, "b": B, "c": A}, INF),
        ({"a": B, "b": A}, 6.0),
        ([A, B], INF),
        ({"a": A, "b": B + 1e-3 * torch.eye(2).double()[1]}, 1e-3),
    ],
)
def test_every_output_counts(given: Any, error: float) -> None:
    assert outputs_error({"a": A, "b": B}, given) == pytest.approx(error, rel=1e-9)


def test_no_output_proves_nothing() -> None:
    assert outputs_error({}, {}) == outputs_error(None, None) == INF
    assert outputs_error({"a": A[:0]}, {"a": A[:0]}) == 0


@pytest.mark.parametrize("change", [1.0, 1j, -1 - 1j])
def test_complex_outputs_are_compared_in_both_parts(change: complex) -> None:
    x = torch.complex(A, B)
    assert outputs_error(x, x) == 0
    assert outputs_error(x, x + 1e-6 * change) > 1e-7


@pytest.mark.parametrize(("x", "y", "error"), [(A, A * 1.5, 0.5), (A, A * NAN, INF), (A.long(), A.long() + 3, 1.0)])
def test_files_are_compared_by_the_size_of_outputs(x: Tensor, y: Tensor, error: float) -> None:
    assert error_to_size(x, y) == error
    assert error_to_size(x, y, least=4.0) == (error / 2 if error < 1 else error)


# inputs ---------------------------------------------------------------------------------------------------------------


def test_a_difference_that_only_large_inputs_show_is_noticed() -> None:
    """A bound that activations reach with large inputs alone; control: normal ones do not see it."""
    first, other = _program(F.relu), _program(lambda h: h.relu().clamp(max=8.0))
    assert first(torch.randn(100, 5).double())["z"].abs().max() < 8
    normal, large = trials(first)
    assert normal.error(other(*normal.inputs)) <= PRESERVED
    assert large.error(other(*large.inputs)) > 1e-2
    assert same_function(first, other) > 1e-2
    assert same_function(first, _program(F.relu)) == 0


def test_a_difference_that_only_normal_inputs_show_is_noticed() -> None:
    """Saturated by large inputs: a slope of tanh."""
    wide = lambda f: lambda h: f(1e3 * h.sign() + h)  # noqa: E731
    first, other = _program(lambda h: torch.tanh(h)), _program(lambda h: torch.tanh(1.01 * h))
    assert same_function(first, other) > 1e-4
    assert same_function(_program(wide(torch.tanh)), _program(wide(lambda h: torch.tanh(1.01 * h)))) <= PRESERVED


def _attention(s: Any, ids: Tensor) -> Tensor:
    h = s.e(ids)
    return s.h(F.scaled_dot_product_attention(s.q(h), s.k(h), h))


def test_ids_are_drawn_from_all_that_embeddings_know() -> None:
    """Equal tokens hide how they attend to each other: with the example's ids any queries would do."""
    torch.manual_seed(0)
    layers = {"e": nn.Embedding(9, 8), "q": nn.Linear(8, 8), "k": nn.Linear(8, 8), "h": nn.Linear(8, 3)}
    program = trace(net(_attention, **layers).double().eval(), torch.zeros(2, 6, dtype=torch.long))
    weights = program.weights[0]
    broken = program.with_weights([{**weights, "q.weight": weights["q.weight"].flip(0)}])
    assert outputs_error(program(*program.example_inputs), broken(*program.example_inputs)) <= PRESERVED
    assert same_function(program, broken) > 1e-3
    (drawn,) = random_inputs(program, torch.Generator().manual_seed(0))
    assert set(drawn.flatten().tolist()) <= set(range(9))
    assert len(drawn.unique()) > 3


def test_booleans_and_complex_numbers_are_drawn_and_other_integers_stay() -> None:
    forward = lambda s, x, keep, count: s.a(x.real * keep) + count + x.imag[:, :3]  # noqa: E731
    inputs = torch.randn(4, 5, dtype=torch.complex64), torch.ones(4, 5, dtype=torch.bool), torch.arange(3)
    program = trace(net(forward, a=nn.Linear(5, 3)).eval(), inputs, dynamic_shapes=None)
    x, keep, count = random_inputs(program, torch.Generator().manual_seed(0))
    assert x.dtype == torch.complex64
    assert min(x.real.std(), x.imag.std()) > 0.1
    assert not torch.equal(x, inputs[0])
    assert keep.unique().tolist() == [False, True]
    assert torch.equal(count, inputs[2])
    assert [trial.large for trial in trials(program)] == [False, True]


def test_drawn_booleans_that_hide_everything_give_way_to_the_examples() -> None:
    forward = lambda s, x, keep: s.a(F.softmax(torch.where(keep, x, -torch.inf), 1))  # noqa: E731
    keep = torch.ones(64, 1, dtype=torch.bool).expand(64, 2).contiguous()
    program = trace(net(forward, a=nn.Linear(2, 3)).eval(), (torch.randn(64, 2), keep))
    first, _ = trials(program)
    assert first.inputs[1].all()
    assert not torch.equal(first.inputs[0].float(), program.example_inputs[0])
    assert same_function(program, program) == 0


# rounding -------------------------------------------------------------------------------------------------------------


def test_chaos_at_large_inputs_says_nothing_and_hides_nothing() -> None:
    """Sines of large inputs: rounding is all there is to see, but at normal ones an error is an error."""
    first = _program(lambda h: h.pow(15).sin())
    weights = first.to("cpu", torch.float64).weights[0]
    off = {**weights, "a.weight": weights["a.weight"] * (1 + 1e-15)}
    rounded = lambda inputs: run(first.graph, off, inputs)  # noqa: E731
    _, large = trials(first)
    assert outputs_error(large.expected, rounded(large.inputs)) > PRESERVED
    assert function_error(first, rounded) <= PRESERVED
    assert same_function(first, first.with_weights([{**weights, "b.bias": weights["b.bias"] + 1}])) > 1e-3


def test_large_outputs_that_are_infinite_do_not_count() -> None:
    first = _program(lambda h: h.pow(4).exp())
    normal, large = trials(first)
    assert not large.expected["y"].isfinite().all()
    assert large.error({}) == 0
    assert normal.error(normal.expected) == 0
    assert same_function(first, _program(lambda h: h.pow(4).exp() + 1)) > 1e-3

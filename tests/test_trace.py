"""Capture: the graph computes what the module computes, in every mode, and the module is left alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import close
from micro_models import MICRO, Micro, conv, net, parameter
from torch import Tensor, nn

from vfx.capture.capture import capture as trace
from vfx.errors import ArgumentError, CaptureError
from vfx.operators import operator
from vfx.program import Program


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _same(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def _operators(program: Program) -> list[str]:
    return [operator(node) for node in program.graph.nodes if node.op == "call_function"]


def _cnn() -> nn.Module:
    return nn.Sequential(
        conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3)
    )


def _swin_mask(self: Any, x: Tensor) -> Tensor:
    mask = x.new_zeros(4, 4)
    for count, rows in enumerate((slice(0, 2), slice(2, 3), slice(3, None))):
        mask[rows] = count
    flat = mask.view(1, 16)
    difference = flat.unsqueeze(1) - flat.unsqueeze(2)
    mask = difference.masked_fill(difference != 0, -100.0)
    return F.softmax(self.fc(x).unsqueeze(2) * self.fc(x).unsqueeze(1) + mask, 2).sum(1)


@pytest.mark.parametrize("micro", MICRO, ids=lambda micro: micro.name)
def test_graph_equals_the_module_at_other_batch_sizes_and_in_float64(micro: Micro) -> None:
    torch.manual_seed(0)
    model = micro.build().eval()
    program = trace(model, micro.inputs())
    precise, wide = copy.deepcopy(model).double(), program.to(dtype=torch.float64)
    for batch in (1, 7):
        inputs = [torch.randn(batch, *shape[1:], dtype=torch.float64) for shape in micro.shapes]
        single = [x.float() for x in inputs]
        # In-place operators may write into the inputs' views: each run gets its own.
        _same(program(*[x.clone() for x in single]), model(*[x.clone() for x in single]), 1e-5)
        _same(wide(*[x.clone() for x in inputs]), precise(*[x.clone() for x in inputs]))


def test_tensors_are_addressed_by_the_names_of_the_module() -> None:
    model = _cnn()
    program = trace(model, torch.randn(2, 3, 4, 4))
    names = set(model.state_dict()) - {"1.num_batches_tracked"}
    assert set(program.names()) == names
    for name in names:
        assert program.weights[0][name].data_ptr() == model.state_dict()[name].data_ptr()
    assert program.buffers >= {"1.running_mean", "1.running_var"}
    assert "0.weight" not in program.buffers
    assert [node.name for node in program.placeholders] != []


def test_layers_stay_whole() -> None:
    program = trace(_cnn(), torch.randn(2, 3, 4, 4))
    assert _operators(program) == [
        "aten.conv2d", "aten.batch_norm", "aten.relu", "aten.dropout", "aten.flatten", "aten.linear"
    ]  # fmt: skip


def test_a_tied_weight_is_read_under_one_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(5, 5)
            self.second = nn.Linear(5, 5)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.relu(self.first(x)))

    model = Tied()
    program = trace(model, torch.randn(2, 5))
    assert program.aliases == {"second.weight": "first.weight"}
    assert set(program.names()) == {"first.weight", "first.bias", "second.bias"}
    x = torch.randn(3, 5)
    _same(program(x), model(x))


def test_a_weight_and_its_transpose_are_two_tensors() -> None:
    """They have one place in memory and one shape, and differ in their strides."""
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)).double()
    model[1].weight = nn.Parameter(model[0].weight.detach().t())
    x = torch.randn(3, 5, dtype=torch.float64)
    program = trace(model, x)
    assert program.aliases == {}
    torch.testing.assert_close(program(x), model(x), rtol=0, atol=1e-14)


def _called(program: Program) -> list[str]:
    return [operator(node) for node in program.graph.nodes if node.op == "call_function"]


def test_values_that_are_detached_are_these_values() -> None:
    model = net(lambda s, x: s.b(s.a(x).detach().relu()), a=nn.Linear(5, 4), b=nn.Linear(4, 2))
    assert _called(trace(model, torch.randn(2, 5))) == ["aten.linear", "aten.relu", "aten.linear"]


def test_what_is_asserted_computes_nothing() -> None:
    """torch.export notes the type of what is cast."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        torch._assert_async((x == x).all())
        return self.b(self.a(x).to(torch.float64).sin().to(torch.float32))

    model = net(forward, a=nn.Linear(5, 4), b=nn.Linear(4, 2))
    assert not [name for name in _called(trace(model, torch.randn(2, 5))) if "assert" in name]


def test_a_large_mask_that_takes_little_time_is_a_constant() -> None:
    model = net(lambda s, x: s.a(x) @ torch.ones(512, 512).tril(), a=nn.Linear(3, 512))
    program = trace(model, torch.randn(2, 3))
    assert _called(program) == ["aten.linear", "aten.matmul"]
    assert torch.equal(program.weights[0]["_folded_0"], torch.ones(512, 512).tril())


@pytest.mark.parametrize("same", [lambda h: F.dropout(h, 0.5, False), lambda h: h.type_as(h), torch.atleast_2d])
def test_what_returns_its_input_is_written_to_with_it(same: Callable[[Tensor], Tensor]) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        h = self.a(x)
        part = h[:, :2]
        same(h).mul_(3)
        return self.b(h) + part

    model = net(forward, a=nn.Linear(5, 4), b=nn.Linear(4, 2)).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(trace(model, x)(x), model(x), rtol=0, atol=1e-14)


def test_a_module_called_twice_has_one_weight() -> None:
    model = net(lambda s, x: s.a(F.relu(s.a(x))), a=nn.Linear(5, 5))
    program = trace(model, torch.randn(2, 5))
    assert program.names() == ["a.weight", "a.bias"]
    assert _operators(program).count("aten.linear") == 2


def test_masks_written_in_place_become_constants() -> None:
    model = net(_swin_mask, fc=nn.Linear(16, 16))
    program = trace(model, torch.randn(2, 16))
    assert not {"aten.fill_", "aten.new_zeros", "aten.masked_fill", "aten.slice"} & set(_operators(program))
    folded = [name for name in program.names() if name.startswith("_folded")]
    assert len(folded) == 1
    assert program.weights[0][folded[0]].shape == (1, 16, 16)
    x = torch.randn(3, 16)
    _same(program(x), model(x), 1e-6)


def test_a_constant_read_before_it_is_overwritten_is_not_folded_wrongly() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        mask = x.new_ones(5)
        first = x * mask
        mask[:2] = 0
        return torch.cat([first, x * mask], 1)

    x = torch.randn(3, 5)
    model = net(forward)
    program = trace(model, x)
    _same(program(x), model(x))


def test_inputs_written_into_a_mask_are_not_folded() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        table = x.new_zeros(2, 5)
        table[0] = x.sum(0)
        return x + table.sum(0)

    program = trace(net(forward), torch.randn(2, 5))
    x = torch.randn(4, 5)
    _same(program(x), x + x.sum(0))


def test_a_literal_changed_in_place_is_the_same_at_every_call() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        offset = torch.tensor([1.0, 2.0, 3.0])
        offset.add_(1)
        return x + offset

    program = trace(net(forward), torch.randn(2, 3))
    x = torch.randn(2, 3)
    expected = x + torch.tensor([2.0, 3.0, 4.0])
    for _ in range(3):
        _same(program(x), expected)


def test_in_place_operators_become_functional() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(inplace=True), nn.Linear(5, 5), nn.SiLU(inplace=True))
    assert not [name for name in _operators(trace(model, torch.randn(2, 5))) if name.endswith("_")]


def _alias_read_later(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    view = h[:, :2]
    view.relu_()
    return self.b(h)


def _alias_read_before(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    kept = h + 1
    h.relu_()
    return self.b(h) + kept


def _through_dropout(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    self.drop(h).relu_()
    return h


def _through_cast(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    h.type_as(x).mul_(2)
    return self.b(h)


def _through_flatten(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    h.flatten(1).reshape(h.shape).contiguous().exp_()
    return self.b(h)


def _through_chunk(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    h.split([2, 3], 1)[1].zero_()
    return h


@pytest.mark.parametrize(
    "forward",
    [_alias_read_later, _alias_read_before, _through_dropout, _through_cast, _through_flatten, _through_chunk],
    ids=lambda forward: forward.__name__,
)
def test_in_place_writes_reach_every_alias(forward: Any) -> None:
    torch.manual_seed(0)
    model = net(forward, a=nn.Linear(5, 5), b=nn.Linear(5, 5), drop=nn.Dropout(0.5)).eval()
    program = trace(model, torch.randn(2, 5))
    x = torch.randn(7, 5)
    with torch.no_grad():  # autograd forbids writing into a split
        _same(program(x), model(x))


def test_the_model_is_left_alone() -> None:
    model = _cnn().train()
    model[3].eval()
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    model[0].weight.requires_grad_(False)
    state = {
        name: (tensor, tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()
    }
    modes = [module.training for module in model.modules()]
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    program = trace(model, torch.randn(2, 3, 4, 4))
    program(torch.randn(5, 3, 4, 4))
    assert modes == [module.training for module in model.modules()]
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is state[name][0]
        assert tensor.data_ptr() == state[name][1]
        assert torch.equal(tensor, state[name][2])
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"0.weight"}
    for name, gradient in gradients.items():
        assert torch.equal(dict(model.named_parameters())[name].grad, gradient)
    assert not any(tensor.requires_grad for tensor in program.weights[0].values())


def test_a_cached_activation_does_not_hinder_the_capture() -> None:
    model = net(lambda s, x: s.fc(x), fc=nn.Linear(5, 2))
    vars(model)["cache"] = model(torch.randn(2, 5))  # a tensor that deepcopy refuses: it has a gradient history
    assert trace(model, torch.randn(2, 5))(torch.randn(3, 5)).shape == (3, 2)


def test_programs_survive_deepcopy_and_graph_copies() -> None:
    program = trace(_cnn().eval(), torch.randn(2, 3, 4, 4))
    x = torch.randn(3, 3, 4, 4)
    again = copy.deepcopy(program)
    # The captured graph is in eval form: dropout and batch_norm do nothing random.
    _same(again(x), program(x))


def test_a_single_sample_is_doubled() -> None:
    program = trace(_cnn(), torch.randn(1, 3, 4, 4))
    assert program.example_inputs[0].shape[0] == 2
    assert program(torch.randn(1, 3, 4, 4)).shape == (1, 3)


def test_two_inputs_share_the_batch() -> None:
    model = net(lambda s, x, y: s.a(x) + s.b(y), a=nn.Linear(5, 4), b=nn.Linear(3, 4))
    program = trace(model, (torch.randn(1, 5), torch.randn(1, 3)))
    x, y = torch.randn(6, 5), torch.randn(6, 3)
    _same(program(x, y), model(x, y), 1e-6)
    with pytest.raises(ArgumentError, match=r"takes 2 inputs .* got 1"):
        program(x)


def test_variadic_forward() -> None:
    model = net(lambda s, *xs: s.a(xs[0]) + xs[1], a=nn.Linear(5, 4))
    program = trace(model, (torch.randn(2, 5), torch.randn(2, 4)))
    x, y = torch.randn(6, 5), torch.randn(6, 4)
    _same(program(x, y), model(x, y), 1e-6)


def test_nested_outputs_keep_their_structure() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        h = self.a(x)
        return {"logits": h, "more": (h.relu(), [h.sum(1)]), "none": None}

    model = net(forward, a=nn.Linear(5, 4))
    x = torch.randn(3, 5)
    actual, expected = trace(model, torch.randn(2, 5))(x), model(x)
    assert set(actual) == set(expected)
    assert isinstance(actual["more"], tuple)
    assert isinstance(actual["more"][1], list)
    assert actual["none"] is None
    _same(actual["logits"], expected["logits"])
    _same(actual["more"][1][0], expected["more"][1][0])


def test_an_output_may_be_an_input_or_the_same_value_twice() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        h = self.a(x)
        return h, x, h

    model = net(forward, a=nn.Linear(5, 4))
    x = torch.randn(3, 5)
    _same(trace(model, torch.randn(2, 5))(x), model(x))


def test_a_fixed_batch_is_refused_with_the_way_out() -> None:
    model = net(lambda s, x: s.a(x).view(2, -1), a=nn.Linear(5, 4))
    with pytest.raises(CaptureError, match=r"Net with inputs \(2, 5\).*Way out.*dynamic_shapes="):
        trace(model, torch.randn(2, 5))
    program = trace(model, torch.randn(2, 5), dynamic_shapes=None)
    assert program(torch.randn(2, 5)).shape == (2, 4)


def test_data_dependent_control_flow_is_refused() -> None:
    model = net(lambda s, x: s.a(x) if x.sum() > 0 else x, a=nn.Linear(5, 5))
    with pytest.raises(CaptureError, match=r"where shapes or branches depend on values"):
        trace(model, torch.randn(2, 5))


def test_an_input_that_does_not_fit_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"Sequential with inputs \(2, 3\).*example inputs fit forward"):
        trace(nn.Sequential(nn.Linear(5, 4)), torch.randn(2, 3))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.randn(0, 5), "empty batch"),
        ((), "non-empty tuple"),
        (None, "NoneType"),
        ("x", "str"),
        ({"x": torch.randn(2, 5)}, "dict"),
        (torch.tensor(1.0), "batch axis"),
        ((3,), "batch axis"),
    ],
)
def test_unusable_example_inputs(inputs: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        trace(nn.Sequential(nn.Linear(5, 4)), inputs)


def test_an_exported_program_is_accepted() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU()).eval()
    exported = torch.export.export(model, (torch.randn(2, 5),))
    program = trace(exported, torch.randn(2, 5))
    x = torch.randn(2, 5)
    _same(program(x), model(x))
    assert program.module is None


def test_weights_pickle() -> None:
    program = trace(_cnn(), torch.randn(2, 3, 4, 4))
    again = pickle.loads(pickle.dumps(dict(program.weights[0])))
    assert all(torch.equal(again[name], tensor) for name, tensor in program.weights[0].items())


def test_a_parameter_used_bare_keeps_its_name() -> None:
    model = net(lambda s, x: x * s.scale.exp(), scale=parameter(5))
    assert trace(model, torch.randn(2, 5)).names() == ["scale"]


class WritesInPlace(nn.Module):
    """Writes into its own input and into a buffer, as caches and counters do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return x.mul_(2) + self.seen


def test_running_a_program_changes_neither_inputs_nor_buffers() -> None:
    model = WritesInPlace().eval()
    program = trace(model, torch.randn(3, 4))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    kept = x.clone()
    first, second = program(x), program(x)
    assert torch.equal(x, kept)
    assert torch.equal(model.seen, torch.zeros(4))
    assert torch.equal(first, second)
    assert torch.equal(first, 2 * kept + 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels of CUDA bound the batch")
def test_networks_on_a_gpu_are_captured_with_an_open_batch() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).cuda().eval()
    x = torch.randn(4, 1, 8, 8, device="cuda")
    larger = torch.cat([x, x, x[:1]])
    close(trace(model, x)(larger), model(larger), 1e-4)

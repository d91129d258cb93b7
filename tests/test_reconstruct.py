"""Reconstruction of whole networks: every layer against least squares on all rows written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import close, edges, images, node_values
from literal import (
    EXACT,
    RIDGE,
    THIRDS,
    VECTORS,
    X,
    close_solutions,
    drawn,
    equal_weights,
    fitted,
    held_errors,
    literal_solution,
    with_ones,
)
from micro_models import between, conv, net, norm_first, parameter
from torch import Tensor, fx, nn
from vfx.passes.duplicate_branches import DuplicateBranches
from vfx.passes.interpolate import Interpolate
from vfx.passes.reconstruct import Reconstruct

from vfx.api import trace
from vfx.emit.module import emit
from vfx.errors import ArgumentError, PassError
from vfx.program import Program
from vfx.reconstruct.forms import Form, form_of
from vfx.reconstruct.references import Reference
from vfx.reconstruct.solve import RIDGES, START, RidgeProblem
from vfx.statistics.spill import Spill

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


Build = Callable[[], nn.Module]


def _close_weights(found: Program, expected: Program, tolerance: float) -> None:
    assert found.weights[0].keys() == expected.weights[0].keys()
    for name, tensor in expected.weights[0].items():
        close(found.weights[0][name], tensor, tolerance)


def _solved(aligned: Program, x: Any = X, start: Program | None = None, **options: Any) -> Program:
    options = {"ridge": RIDGE, "progress": False} | options
    return Reconstruct(aligned, x, **options)(start or Interpolate(options.get("weights"))(aligned))


def _run(aligned: Program, start: Program, **options: Any) -> tuple[Program, Any]:
    result = Reconstruct(aligned, X, progress=False, **options).run(start)
    return result.program, result.record


def _mean(values: Sequence[Tensor], shares: Sequence[float] | None = None) -> Tensor:
    shares = shares or [1 / len(values)] * len(values)
    return sum(share * value for share, value in zip(shares, values))  # type: ignore[return-value]


def _goal(aligned: Program, node: str, x: Tensor = X, shares: Sequence[float] | None = None) -> Tensor:
    """The mean of the edges' values at a node."""
    return _mean([node_values(aligned, x, edge)[node] for edge in range(aligned.edges)], shares)


def _flat(y: Tensor) -> Tensor:
    """A value (samples, channels, …) as rows of channels."""
    return y.movedim(1, -1).flatten(0, -2)


def _unfolded(x: Tensor, layer: nn.Conv2d) -> Tensor:
    options: Any = (layer.dilation, layer.padding, layer.stride)
    return F.unfold(x, layer.kernel_size, *options).mT.flatten(0, 1)  # type: ignore[arg-type]


def _stacked(weight: Tensor, bias: Tensor) -> Tensor:
    """A layer's weight and the bias below it, (inputs + 1, outputs)."""
    return torch.cat([weight.flatten(1).T, bias[None]])


def _layer(weights: Any, name: str) -> Tensor:
    return _stacked(weights[f"{name}.weight"], weights[f"{name}.bias"])


def chain() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = F.relu(self.b(F.relu(self.a(x))))
        return self.fc(torch.tanh(self.mid(h.flatten(1))))

    layers = {"a": nn.Conv2d(3, 5, 3, 2, 1), "b": nn.Conv2d(5, 4, 2, dilation=2)}
    return net(forward, **layers, mid=nn.Linear(4, 3), fc=nn.Linear(3, 3))


@torch.no_grad()
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.1])
@pytest.mark.parametrize(("count", "weights"), [(2, None), (2, 0.3), (3, THIRDS)])
def test_layers_are_solved_one_after_the_other(count: int, weights: Any, ridge: float) -> None:
    """A loop over activations: each layer reads what the layers solved before it give."""
    models: Any = edges(chain, X, count)
    program = trace(models, X[:2])
    shares = weights if count == 3 else [0.5, 0.5] if weights is None else [0.7, 0.3]
    found = _solved(program, weights=weights, ridge=ridge).weights[0]
    x, ys = X, [X] * count
    for name in ("a", "b", "mid", "fc"):
        layers = [getattr(model, name) for model in models]
        ys = [layer(y) for layer, y in zip(layers, ys)]
        before = _mean([_stacked(layer.weight, layer.bias) for layer in layers], shares)
        rows = with_ones(x if x.ndim == 2 else _unfolded(x, layers[0]))
        goal = _flat(_mean(ys, shares))
        close(_layer(found, name), fitted(rows, goal, before, ridge), EXACT)
        if name != "a":  # all read the same pictures there: the average is the solution
            other = fitted(with_ones(torch.rand_like(rows[:, :-1])), goal, before, ridge)
            assert (_layer(found, name) - other).abs().max() > 1e-3, "negative control: other inputs"
            assert (_layer(found, name) - before).abs().max() > 1e-3, "negative control: the average is no solution"
        solution = fitted(rows, goal, before, ridge)
        own = {"weight": solution[:-1].T.reshape(layers[0].weight.shape), "bias": solution[-1]}
        x = torch.func.functional_call(layers[0], own, x)
        act: Any = {"mid": torch.tanh, "fc": lambda y: y}.get(name, F.relu)
        x, ys = act(x), [act(y) for y in ys]
        if name == "b":
            x, ys = x.flatten(1), [y.flatten(1) for y in ys]


def mixed() -> nn.Module:
    """Every kind of layer, in a row."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        h = F.relu(self.depth(h))
        h = F.relu(self.group(h))
        h = F.relu(self.up(h))
        h = F.relu(self.same(h)).flatten(2)
        h = F.relu(self.line(h)).mT
        h = torch.tanh(h @ self.w)
        h = torch.tanh(torch.einsum("bti,hio->bhto", h, self.heads))
        return self.fc(torch.tanh(h @ self.own).mean(2).flatten(1))

    return net(
        forward, stem=conv(3, 8), depth=conv(8, 8, groups=8), group=nn.Conv2d(8, 6, 3, 2, groups=2, bias=False),
        up=nn.ConvTranspose2d(6, 4, 3, 2, groups=2, output_padding=1), same=nn.Conv2d(4, 5, 2, padding="same"),
        line=nn.Conv1d(5, 6, 3, dilation=2), w=parameter(6, 5), heads=parameter(2, 5, 4), own=parameter(2, 4, 3),
        fc=nn.Linear(6, 2),
    )  # fmt: skip


LAYERS = ("conv2d", "conv2d_1", "conv2d_2", "conv_transpose2d", "conv2d_3", "conv1d", "matmul", "einsum", "matmul_1")


@pytest.mark.parametrize("node", [*LAYERS, "linear"])
def test_no_step_makes_a_layer_err_less(node: str, mixed_networks: tuple[Program, Program]) -> None:
    """Whatever a layer's form: the gradient of its own squared error, by autograd through the call, is zero."""
    aligned, result = mixed_networks
    gradients = {}
    for name, program in (("solved", result), ("average", Interpolate()(aligned))):
        values, call = node_values(result, X), result.node(node)
        own = {a: program.weights[0][str(a.target)].clone() for a in call.all_input_nodes if a.op == "get_attr"}
        for tensor in own.values():
            tensor.requires_grad_()
        args, kwargs = fx.node.map_arg((call.args, call.kwargs), lambda a, o=own, v=values: o.get(a, v[a.name]))  # type: ignore
        error = (call.target(*args, **kwargs) - _goal(aligned, node)).square().sum()  # type: ignore[operator]
        gradients[name] = torch.cat([g.flatten() for g in torch.autograd.grad(error, list(own.values()))])
    if node != "conv2d":
        assert gradients["average"].norm() > 1e-3, "negative control"
    assert gradients["solved"].norm() < EXACT * max(1.0, float(gradients["average"].norm()))


@pytest.fixture(scope="module")
def mixed_networks() -> tuple[Program, Program]:
    aligned = trace(edges(mixed, X), X[:2])
    return aligned, _solved(aligned, ridge=0.0)


def _map(program: Program, node: str, norm: str | None = None) -> tuple[Form, str, Tensor, Tensor | None]:
    """A call's form and source, and its matrix and bias, those of the BatchNorm module ``norm`` behind it included."""
    found = form_of(program.node(node))
    assert found is not None
    form, source, weight, bias = found
    own = program.weights[0]
    matrix = form.matrix(own[str(weight.target)])
    shape = (matrix.shape[0], matrix.shape[2])
    shift = None if bias is None else own[str(bias.target)].reshape(shape)
    if norm is not None:
        ones = torch.ones(shape, dtype=matrix.dtype)
        mean, variance = (own[f"{norm}.running_{role}"].reshape(shape) for role in ("mean", "var"))
        scale = own.get(f"{norm}.weight", ones).reshape(shape) / (variance + 1e-5).sqrt()
        beta = own.get(f"{norm}.bias", ones * 0).reshape(shape)
        matrix, shift = matrix * scale[:, None], beta + scale * ((0 if shift is None else shift) - mean)
    return form, source.name, matrix, shift


def _check(
    result: Program, start: Program, node: str, goal: Tensor, norm: str | None = None, x: Tensor = X,
    ridge: float = RIDGE, support: Tensor | None = None,
) -> None:  # fmt: skip
    """A layer of ``result`` is the literal solution for its own inputs, with the ridge towards ``start``."""
    form, source, matrix, bias = _map(result, node, norm)
    _, _, centre, shift = _map(start, node, norm)
    rows = form.rows(node_values(result, x)[source])
    expected = literal_solution(rows, form.goals(goal), centre, shift, support, ridge)
    close_solutions((matrix, bias), expected)


def _differs(found: Program, other: Program, name: str) -> None:
    """Negative control."""
    assert (found.weights[0][name] - other.weights[0][name]).abs().max() > 1e-3


# BatchNorm ------------------------------------------------------------------------------------------------------------


def normed(layer: Callable[[], nn.Module], norm: Callable[[int], nn.Module]) -> Build:
    """A layer with a BatchNorm behind it, between others; linear ones read means over the positions."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        h = self.norm(self.layer(h.mean((2, 3)) if isinstance(self.layer, nn.Linear) else h))
        return self.fc(F.relu(h).flatten(2).mean(2) if h.ndim > 2 else F.relu(h))

    return lambda: net(forward, stem=conv(3, 6), layer=layer(), norm=norm(4), fc=nn.Linear(4, 2))


NORMED: dict[str, tuple[Callable[[], nn.Module], Callable[[int], nn.Module], str]] = {
    "conv": (lambda: conv(6, 4), nn.BatchNorm2d, "conv2d_1"),
    "conv without bias": (lambda: conv(6, 4, bias=False), nn.BatchNorm2d, "conv2d_1"),
    "grouped": (lambda: conv(6, 4, groups=2), nn.BatchNorm2d, "conv2d_1"),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 2, 2, groups=2), nn.BatchNorm2d, "conv_transpose2d"),
    "linear": (lambda: nn.Linear(6, 4), nn.BatchNorm1d, "linear"),
    "no gain, no shift": (lambda: conv(6, 4), lambda width: nn.BatchNorm2d(width, affine=False), "conv2d_1"),
}


@pytest.mark.parametrize("name", NORMED)
def test_a_layer_and_its_batchnorm_are_one_map(name: str) -> None:
    layer, norm, node = NORMED[name]
    aligned = trace(edges(normed(layer, norm), X), X[:2])
    start = Interpolate()(aligned)
    result = _solved(aligned)
    goal = _goal(aligned, "batch_norm")
    _check(result, start, node, goal, "norm")
    _differs(result, start, "layer.weight")
    with pytest.raises(AssertionError):  # negative control: the layer's own outputs are not the goal
        _check(result, start, node, _goal(aligned, node), "norm")


@torch.no_grad()
@pytest.mark.parametrize("name", list(NORMED)[:-1])
def test_running_statistics_are_those_of_the_data(name: str) -> None:
    """So the result goes on alike in training, in the user's class."""
    layer, norm, node = NORMED[name]
    aligned = trace(edges(normed(layer, norm), X), X[:2])
    result = _solved(aligned)
    rows = _flat(node_values(result, X)[node])
    close(result.weights[0]["norm.running_mean"], rows.mean(0), EXACT)
    close(result.weights[0]["norm.running_var"], rows.var(0, correction=0), EXACT)
    module, reason = emit(result)
    assert not reason
    assert type(module) is type(aligned.module)
    still = module(X)
    close(still, result(X), 1e-12)
    close(module.train()(X), still, 1e-6)
    average = emit(Interpolate()(aligned))[0]
    gap = (average(X) - average.train()(X)).abs().max()
    assert gap > 1e-3, "negative control: the average's statistics are not those of the data"


def test_a_batchnorm_without_gain_keeps_its_variance() -> None:
    layer, norm, _ = NORMED["no gain, no shift"]
    aligned = trace(edges(normed(layer, norm), X), X[:2])
    start, result = Interpolate()(aligned), _solved(aligned)
    assert torch.equal(result.weights[0]["norm.running_var"], start.weights[0]["norm.running_var"])
    assert torch.equal(result.weights[0]["layer.bias"], start.weights[0]["layer.bias"])


def test_dead_and_negative_gains() -> None:
    """A channel that the average's BatchNorm puts out comes back, for its edges' outputs may differ."""
    models: Any = edges(normed(*NORMED["conv"][:2]), X)
    with torch.no_grad():
        for model, sign in zip(models, (1, -1)):
            model.norm.weight[0] = sign * 0.7
            model.norm.weight[1] *= -1
            model.norm.weight[2] = 0
    aligned = trace(models, X[:2])
    start, result = Interpolate()(aligned), _solved(aligned)
    _check(result, start, "conv2d_1", _goal(aligned, "batch_norm"), "norm")
    assert all(tensor.isfinite().all() for tensor in result.weights[0].values())
    close(emit(result)[0].train()(X), result(X), 1e-6)


def crossed(first: Callable[..., Tensor]) -> Build:
    layers: dict[str, Any] = {name: lambda: conv(6, 6) for name in "ab"}
    norms: dict[str, Any] = {name: lambda: nn.BatchNorm2d(6) for name in "mn"}
    return between(lambda s, h: first(s, F.relu(h)), **layers, **norms)


def _second_first(self: Any, h: Tensor) -> Tensor:
    one, two = self.a(h), self.b(h)
    two = self.n(two)
    return self.m(one) + two


def _norm_behind_another_layer(self: Any, h: Tensor) -> Tensor:
    one, two = self.a(h), self.b(h)
    return self.m(one) + self.n(two.relu())


@pytest.mark.parametrize(
    ("first", "goals"),
    [
        (_second_first, {"conv2d_1": ("conv2d_1", None), "conv2d_2": ("batch_norm", "n")}),
        (_norm_behind_another_layer, {"conv2d_1": ("conv2d_1", None), "conv2d_2": ("conv2d_2", None)}),
    ],
)
def test_a_batchnorm_far_behind_its_layer(first: Any, goals: dict[str, tuple[str, str | None]]) -> None:
    """Another layer, or another layer's BatchNorm, runs between a layer and its own: they are solved apart."""
    aligned = trace(edges(crossed(first), X), X[:2])
    result = _solved(aligned, goals="output")
    for node, (goal, norm) in goals.items():
        _check(result, Interpolate()(aligned), node, _goal(aligned, goal), norm)
    _differs(result, Interpolate()(aligned), "m.weight")


# gains and shifts -----------------------------------------------------------------------------------------------------


def _normalised(h: Tensor, weights: Any) -> Tensor:
    mean, variance = (weights[f"n.running_{role}"].reshape(-1, 1, 1) for role in ("mean", "var"))
    return (h - mean) / (variance + 1e-5).sqrt()


Slope = Callable[[Tensor, Any], Tensor]


def _nothing(h: Tensor, weights: Any) -> Tensor:
    return torch.zeros_like(h)


# the module, the call's name, where its parameter stands, and what one unit of the gain adds to which base
DIAGONAL: dict[str, tuple[Build, str, tuple[int, ...], Slope | None, Slope]] = {
    "layer norm": (
        between(lambda s, h: norm_first(s, F.relu(h)), norm=lambda: nn.LayerNorm(6)),
        "layer_norm", (6,), lambda h, w: F.layer_norm(h, (6,)), _nothing,
    ),
    "layer norm of maps": (
        between(lambda s, h: s.n(F.relu(h)), n=lambda: nn.LayerNorm((6, 6, 6))),
        "layer_norm", (6, 6, 6), lambda h, w: F.layer_norm(h, (6, 6, 6)), _nothing,
    ),
    "rms norm": (
        between(lambda s, h: norm_first(s, F.relu(h)), norm=lambda: nn.RMSNorm(6)),
        "rms_norm", (6,), lambda h, w: F.rms_norm(h, (6,)), _nothing,
    ),
    "group norm": (
        between(lambda s, h: s.n(F.relu(h)), n=lambda: nn.GroupNorm(2, 6)),
        "group_norm", (6, 1, 1), lambda h, w: F.group_norm(h, 2), _nothing,
    ),
    "instance norm": (
        between(lambda s, h: s.n(F.relu(h)), n=lambda: nn.InstanceNorm2d(6, affine=True)),
        "instance_norm", (6, 1, 1), lambda h, w: F.instance_norm(h), _nothing,
    ),
    "batch norm": (
        between(lambda s, h: s.n(F.relu(h)), n=lambda: nn.BatchNorm2d(6)),
        "batch_norm", (6, 1, 1), _normalised, _nothing,
    ),
    "layer scale": (
        between(lambda s, h: F.relu(h) * s.p, p=lambda: parameter(6, 1, 1)), "mul", (6, 1, 1), lambda h, w: h, _nothing,
    ),
    "one factor": (
        between(lambda s, h: s.p * F.relu(h), p=lambda: nn.Parameter(torch.randn(()))),
        "mul", (), lambda h, w: h, _nothing,
    ),
    "position embedding": (
        between(lambda s, h: F.relu(h) + s.p, p=lambda: parameter(6, 6, 6)), "add", (6, 6, 6), None, lambda h, w: h,
    ),
    "embedding of rows": (
        between(lambda s, h: s.p + F.relu(h), p=lambda: parameter(1, 6, 1, 6)),
        "add", (1, 6, 1, 6), None, lambda h, w: h,
    ),
    "prelu": (
        between(lambda s, h: s.n(s.c(F.relu(h))), c=lambda: conv(6, 6), n=lambda: nn.PReLU(6)),
        "prelu", (6, 1, 1), lambda h, w: h.clamp(max=0), lambda h, w: h.clamp(min=0),
    ),
    "prelu of one slope": (
        between(lambda s, h: s.n(s.c(F.relu(h))), c=lambda: conv(6, 6), n=lambda: nn.PReLU()),
        "prelu", (1,), lambda h, w: h.clamp(max=0), lambda h, w: h.clamp(min=0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("ridge", [0.0, 0.05])
@pytest.mark.parametrize("name", DIAGONAL)
def test_gains_and_shifts_are_solved_entry_by_entry(name: str, ridge: float) -> None:
    build, node, place, slope, base = DIAGONAL[name]
    aligned = trace(edges(build, X), X[:2])
    start, result = Interpolate()(aligned), _solved(aligned, ridge=ridge)
    [call] = [n for n in result.graph.nodes if n.name == node]
    parameters = [str(a.target) for a in call.all_input_nodes if a.op == "get_attr" and "running" not in str(a.target)]
    [source] = [a.name for a in call.all_input_nodes if a.op == "call_function"]
    h, own = node_values(result, X)[source], result.weights[0]
    rows = [torch.ones_like(h)] if slope is None else [slope(h, own)]
    if slope is not None and len(parameters) == 2:
        rows.append(torch.ones_like(h))
    wanted = _goal(aligned, node) - base(h, own)
    entries = torch.arange(own[parameters[0]].numel()).reshape(place).expand(h.shape)
    found, before = ([program.weights[0][p].flatten() for p in parameters] for program in (result, start))
    moved = 0.0
    for entry in entries.unique():
        chosen = entries == entry
        old = torch.stack([p[entry] for p in before])[:, None]
        expected = fitted(torch.stack([row[chosen] for row in rows], 1), wanted[chosen][:, None], old, ridge)
        close(torch.stack([p[entry] for p in found])[:, None], expected, EXACT)
        moved = max(moved, float((expected - old).abs().max()))
    assert moved > 1e-3, "negative control: the average is no solution"


# one weight, several calls --------------------------------------------------------------------------------------------


def twice() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        first = torch.tanh(self.shared(F.relu(self.stem(x))))
        return self.fc(torch.tanh(self.shared(torch.tanh(self.mid(first)))).mean((2, 3)))

    return net(forward, stem=conv(3, 4), shared=nn.Conv2d(4, 4, 2, groups=2), mid=conv(4, 4), fc=nn.Linear(4, 3))


def test_a_module_called_twice_is_solved_for_both_calls() -> None:
    """Both uses' equations together; up to the second use the network runs ahead with the old weights."""
    aligned = trace(edges(twice, X), X[:2])
    start, result = Interpolate()(aligned), _solved(aligned)
    ahead = {name: (result if name.startswith("stem") else start).weights[0][name] for name in start.weights[0]}
    values = node_values(start.with_weights([ahead]), X)
    form, _, centre, shift = _map(start, "conv2d_1")
    uses = [(_map(start, node)[1], node) for node in ("conv2d_1", "conv2d_3")]
    rows = torch.cat([form.rows(values[source]) for source, _ in uses], 1)
    goals = torch.cat([form.goals(_goal(aligned, node)) for _, node in uses], 1)
    expected = literal_solution(rows, goals, centre, shift, None, RIDGE)
    close_solutions(_map(result, "conv2d_1")[2:], expected)
    alone = literal_solution(rows[:, : X.shape[0] * 25], goals[:, : X.shape[0] * 25], centre, shift, None, RIDGE)
    assert (alone[0] - expected[0]).abs().max() > 1e-3, "negative control: the first use alone"
    _check(result, start, "conv2d_2", _goal(aligned, "conv2d_2"))
    _check(result, start, "linear", _goal(aligned, "linear"))


def shared_block() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.stem(x)
        for _ in range(2):
            h = h + self.shared(F.relu(h))
        return self.fc(h.mean((2, 3)))

    return net(forward, stem=conv(3, 4), shared=conv(4, 4), fc=nn.Linear(4, 3))


def test_a_block_called_twice_is_solved_for_both_sums() -> None:
    aligned = trace(edges(shared_block, X), X[:2])
    start, result = Interpolate()(aligned), _solved(aligned)
    values = node_values(start, X)  # the stem reads the same pictures everywhere: it is solved already
    form, _, centre, shift = _map(start, "conv2d_1")
    wanted = [_goal(aligned, total) - values[known] for total, known in (("add", "conv2d"), ("add_1", "add"))]
    rows = torch.cat([form.rows(values[source]) for source in ("relu", "relu_1")], 1)
    expected = literal_solution(rows, torch.cat([form.goals(goal) for goal in wanted], 1), centre, shift, None, RIDGE)
    close_solutions(_map(result, "conv2d_1")[2:], expected)
    _differs(result, _solved(aligned, goals="output"), "shared.weight")


def waiting() -> nn.Module:
    """The first layer's value waits for an activation while the shared layer, called before it, runs ahead."""

    def forward(self: Any, x: Tensor) -> Tensor:
        waits = self.stem(x)
        first = self.shared(x)
        second = self.shared(torch.tanh(waits))
        return self.fc((first + second).mean((2, 3)))

    return net(forward, stem=conv(3, 3), shared=conv(3, 4), fc=nn.Linear(4, 3))


def test_values_that_wait_are_not_written_to_by_a_run_ahead() -> None:
    aligned = trace(edges(waiting, X), X[:2])
    start, result = Interpolate()(aligned), _solved(aligned)
    activation = next(step for step in start.plan if step.node.name == "tanh")
    assert activation.in_place is not None, "an ordinary run writes over the value that waits"
    _check(result, start, "linear", _goal(aligned, "linear"))


def _two_layouts(self: Any, x: Tensor) -> Tensor:
    return self.c(torch.tanh(torch.tanh(self.a(x)) @ self.a.weight))


def _two_biases(self: Any, x: Tensor) -> Tensor:
    return self.c(F.linear(torch.tanh(self.a(x)), self.a.weight))


def _read_elsewhere(self: Any, x: Tensor) -> Tensor:
    return self.c(torch.tanh(self.a(x)) * self.a.weight.mean())


def _computed(self: Any, x: Tensor) -> Tensor:
    return self.c(torch.tanh(F.linear(x, self.a.weight.tanh(), self.a.bias)))


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (_two_layouts, "different layouts"),
        (_two_biases, "different biases"),
        (_read_elsewhere, "in another way"),
        (_computed, "is computed"),
    ],
)
def test_what_keeps_its_weights_says_why(forward: Any, reason: str) -> None:
    aligned = trace(edges(lambda: net(forward, a=nn.Linear(5, 5), c=nn.Linear(5, 2)), VECTORS), VECTORS[:2])
    start, result = Interpolate()(aligned), _solved(aligned, VECTORS)
    [note] = result.notes
    assert note.startswith("reconstruction: linear keeps its weights")
    assert reason in note
    assert torch.equal(result.weights[0]["a.weight"], start.weights[0]["a.weight"])
    _differs(result, start, "c.weight")


# sums -----------------------------------------------------------------------------------------------------------------


def stream(behind: Callable[..., Tensor], **parts: Any) -> Build:
    """A stream to which ``behind`` adds what a branch gives."""

    def branch(self: Any, h: Tensor) -> Tensor:
        h = F.relu(h)
        return behind(self, h, F.relu(self.a(h)))

    return between(branch, a=lambda: conv(6, 5), b=lambda: conv(5, 6), **parts)


def _added(s: Any, h: Tensor, y: Tensor) -> Tensor:
    return h + s.b(y)


def _behind_dropout(s: Any, h: Tensor, y: Tensor) -> Tensor:
    return s.drop(s.b(y)) + h


def _behind_norm(s: Any, h: Tensor, y: Tensor) -> Tensor:
    return s.n(s.b(y)) + h


def _scaled(s: Any, h: Tensor, y: Tensor) -> Tensor:
    return h + s.p * s.b(y)


def _both_branches(s: Any, h: Tensor, y: Tensor) -> Tensor:
    return s.b(y) + s.c(h)


def _with_a_factor(s: Any, h: Tensor, y: Tensor) -> Tensor:
    return torch.add(h, s.b(y), alpha=2)


def _a_layer_between(s: Any, h: Tensor, y: Tensor) -> Tensor:
    z, other = s.b(y), s.c(h)
    return (h + z) + other


def _read_twice(s: Any, h: Tensor, y: Tensor) -> Tensor:
    z = s.b(y)
    return h + z + z.tanh()


# the calls that are solved for a sum, with the node of the sum and the layer's BatchNorm, and one that is not
STREAMS: dict[str, tuple[Build, dict[str, tuple[str, str | None]], dict[str, str | None]]] = {
    "add": (stream(_added), {"conv2d_2": ("add", None)}, {"conv2d_1": None}),
    "dropout": (stream(_behind_dropout, drop=lambda: nn.Dropout()), {"conv2d_2": ("add", None)}, {"conv2d_1": None}),
    "norm": (stream(_behind_norm, n=lambda: nn.BatchNorm2d(6)), {"conv2d_2": ("add", "n")}, {"conv2d_1": None}),
    "scale": (stream(_scaled, p=lambda: parameter(6, 1, 1)), {}, {"conv2d_2": None}),
    "two branches": (stream(_both_branches, c=lambda: conv(6, 6)), {"conv2d_3": ("add", None)}, {"conv2d_2": None}),
    "a layer between": (stream(_a_layer_between, c=lambda: conv(6, 6)), {}, {"conv2d_2": None, "conv2d_3": None}),
    "factor": (stream(_with_a_factor), {}, {"conv2d_2": None}),
    "read twice": (stream(_read_twice), {}, {"conv2d_2": None}),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_layer_in_front_of_an_add_is_solved_for_the_sum(name: str) -> None:
    build, towards, others = STREAMS[name]
    aligned = trace(edges(build, X), X[:2])
    start, result = Interpolate()(aligned), _solved(aligned)
    values = node_values(result, X)
    for node, (total, norm) in towards.items():
        call = result.node(total)
        [known] = [a for a in call.all_input_nodes if not _depends(a, node)]
        _check(result, start, node, _goal(aligned, total) - values[known.name], norm)
    for node, norm in others.items():
        _check(result, start, node, _goal(aligned, node), norm)


def _depends(node: fx.Node, name: str) -> bool:
    return node.name == name or any(_depends(a, name) for a in node.all_input_nodes)


def test_a_scale_in_front_of_an_add_is_solved_for_the_sum() -> None:
    aligned = trace(edges(STREAMS["scale"][0], X), X[:2])
    start, result = Interpolate()(aligned), _solved(aligned)
    values = node_values(result, X)
    wanted = _goal(aligned, "add") - values["relu"]
    for channel in range(6):
        row, goal = values["conv2d_2"][:, channel].reshape(-1, 1), wanted[:, channel].reshape(-1, 1)
        before = start.weights[0]["p"][channel].reshape(1, 1)
        close(result.weights[0]["p"][channel].reshape(1, 1), fitted(row, goal, before, RIDGE), EXACT)


@pytest.mark.parametrize("name", ["add", "norm"])
def test_goals_of_outputs_leave_the_stream_alone(name: str) -> None:
    build, towards, _ = STREAMS[name]
    aligned = trace(edges(build, X), X[:2])
    start, result = Interpolate()(aligned), _solved(aligned, goals="output")
    [(node, (_, norm))] = towards.items()
    _check(result, start, node, _goal(aligned, "batch_norm" if norm else node), norm)
    _differs(result, _solved(aligned), "b.weight")


# following one edge ---------------------------------------------------------------------------------------------------


def deep() -> nn.Module:
    """Two residual blocks, one with norms."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        h = h + self.b(F.relu(self.a(h)))
        h = F.relu(self.n(self.d(F.relu(self.m(self.c(h))))) + h)
        return self.fc(h.mean((2, 3)))

    layers = {"stem": conv(3, 5), "a": conv(5, 4), "b": conv(4, 5), "c": conv(5, 4), "d": conv(4, 5)}
    return net(forward, **layers, m=nn.BatchNorm2d(4), n=nn.BatchNorm2d(5), fc=nn.Linear(5, 3))


FOLLOWED = {  # of each layer its call and BatchNorm, and the value that it is solved for
    "conv2d": (None, "conv2d"),
    "conv2d_1": (None, "conv2d_1"),
    "conv2d_2": (None, "add"),
    "conv2d_3": ("m", "batch_norm"),
    "conv2d_4": ("n", "add_1"),
    "linear": (None, "linear"),
}
STREAM = {"add": "relu", "add_1": "add"}  # the other operand of each sum


@pytest.fixture(scope="module")
def three() -> Program:
    return trace(edges(deep, X, 3), X[:2])


@pytest.mark.parametrize("edge", [0, 1, 2])
def test_following_to_the_end_gives_that_edge(edge: int, three: Program) -> None:
    for follow in (6, "fc"):
        result = _solved(three, follow=follow, follow_edge=edge)
        close(result(X), three.select(edge)(X), 1e-12)
        equal_weights(result, three.select(edge))
    other = three.select((edge + 1) % 3)(X)
    assert (result(X) - other).abs().max() > 1e-3, "negative control"


@pytest.mark.parametrize("edge", [0, 1])
@pytest.mark.parametrize("follow", [1, 2, 3, 4, 5, "b", "m"])
def test_layers_behind_those_that_follow_are_solved_for_the_mean(follow: int | str, edge: int, three: Program) -> None:
    count = {"b": 3, "m": 4}.get(str(follow), follow)
    assert isinstance(count, int)
    start = Interpolate(THIRDS)(three)
    result = _solved(three, weights=THIRDS, follow=follow, follow_edge=edge)
    values, own = node_values(result, X), node_values(three, X, edge)
    for index, (node, (norm, wanted)) in enumerate(FOLLOWED.items()):
        if index < count:
            close(values[node], own[node], 1e-12)
            continue
        goal = _goal(three, wanted, shares=THIRDS)
        _check(result, start, node, goal - values[STREAM[wanted]] if wanted in STREAM else goal, norm)
    assert f"edge {edge} up to layer {count}" in result.history[-1]


def test_layers_behind_kept_branches_are_solved_for_the_followed_edge() -> None:
    """The joined branches give neither edge's values, so the layers behind are not simply those of the edge."""
    aligned = trace(edges(deep, X), X[:2])
    start = Interpolate()(DuplicateBranches(1)(aligned))
    result = _solved(aligned, start=start, follow=2, follow_edge=1)
    own = {name: aligned.weights[1][name] for name in ("a.weight", "a.bias")}  # what the ridge draws to
    drawn = start.with_weights([start.weights[0] | own])  # type: ignore[operator]
    _check(result, drawn, "conv2d_1", node_values(aligned, X, 1)["conv2d_1"])
    _differs(result, drawn, "a.weight")
    total = _goal(aligned, "add") - node_values(result, X)[_stream_of(result)]
    _check(result, start, "conv2d_2", total)
    for name in start.private:
        assert torch.equal(result.weights[0][name], start.weights[0][name])


def _stream_of(program: Program) -> str:
    [known] = [a for a in program.node("add").all_input_nodes if not _depends(a, "conv2d_2")]
    return known.name


# masks ----------------------------------------------------------------------------------------------------------------

MASKED = {"stem": "conv2d", "depth": "conv2d_1", "group": "conv2d_2", "up": "conv_transpose2d", "fc": "linear"}


def _masked_start(aligned: Program, kept: float) -> tuple[Program, dict[str, Tensor]]:
    """The average with some weights at zero, and its masks."""
    start, generator = Interpolate()(aligned), torch.Generator().manual_seed(1)
    weights = dict(start.weights[0])
    masks = {}
    for name in (f"{layer}.weight" for layer in MASKED):
        masks[name] = torch.rand(weights[name].shape, generator=generator) < kept
        weights[name] = weights[name] * masks[name]
    return start.with_weights([weights]), masks


@pytest.mark.parametrize("kept", [0.6, 0.0])
@pytest.mark.parametrize("ridge", [RIDGE, None])
def test_masks_are_kept_exactly(ridge: float | None, kept: float) -> None:
    aligned = trace(edges(mixed, X), X[:2])
    start, masks = _masked_start(aligned, kept)
    result, solved = _run(aligned, start, ridge=ridge, masks=masks)
    ridges = {one.node: one.ridge for one in solved}
    for layer, node in MASKED.items():
        name = f"{layer}.weight"
        assert not result.weights[0][name][~masks[name]].any()
        support = _map(start, node)[0].matrix(masks[name].double()) > 0
        _check(result, start, node, _goal(aligned, node), support=support, ridge=ridges[node])
        if kept:
            _differs(result, start, name)
    free = _solved(aligned, start=start)
    assert any(free.weights[0][name][~mask].any() for name, mask in masks.items()), "negative control"


def test_masks_of_a_layer_with_a_batchnorm() -> None:
    aligned = trace(edges(normed(*NORMED["conv"][:2]), X), X[:2])
    start = Interpolate()(aligned)
    mask = torch.rand(4, 6, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    weights = start.weights[0] | {"layer.weight": start.weights[0]["layer.weight"] * mask}  # type: ignore[operator]
    start = start.with_weights([weights])
    result = _solved(aligned, start=start, masks={"layer.weight": mask})
    assert not result.weights[0]["layer.weight"][~mask].any()
    support = _map(start, "conv2d_1")[0].matrix(mask.double()) > 0
    _check(result, start, "conv2d_1", _goal(aligned, "batch_norm"), "norm", support=support)
    close(emit(result)[0].train()(X), result(X), 1e-6)


@pytest.mark.parametrize("centre", ["own", "references"])
def test_masks_hold_whatever_the_ridge_draws_to(centre: str) -> None:
    """Dense references, and weights that are dense themselves."""
    aligned = trace(edges(chain, X), X[:2])
    generator = torch.Generator().manual_seed(0)
    shapes = {name: aligned.weights[0][name].shape for name in ("b.weight", "fc.weight")}
    masks = {name: torch.rand(shape, generator=generator) < 0.6 for name, shape in shapes.items()}
    result = _solved(aligned, masks=masks, centre=centre)
    for (name, mask), node in zip(masks.items(), ("conv2d_1", "linear_1")):
        assert not result.weights[0][name][~mask].any()
        support = _map(result, node)[0].matrix(mask.double()) > 0
        _check(result, Interpolate()(aligned), node, _goal(aligned, node), support=support)


# ridge, centre, rounds ------------------------------------------------------------------------------------------------


def test_the_ridge_is_chosen_layer_by_layer_on_held_samples() -> None:
    """Every fifth sample is held out; the solution then comes from all."""
    x = images(60, 6, seed=4, dtype=torch.float64)
    aligned = trace(edges(chain, x, 2, 40), x[:2])
    start = Interpolate()(aligned)
    done = Reconstruct(aligned, x, progress=False).run(start)
    result = done.program
    values, held = node_values(result, x), torch.arange(60) % 5 == 4
    assert [solved.node for solved in done.record] == ["conv2d", "conv2d_1", "linear", "linear_1"]
    for solved in done.record[1:]:
        form, source, centre, bias = _map(start, solved.node)
        goal = _goal(aligned, solved.node, x)
        parts = [(form.rows(values[source][chosen]), form.goals(goal[chosen])) for chosen in (~held, held)]
        errors = held_errors(RidgeProblem(centre, bias), parts)
        least = errors.index(min(errors))
        assert errors[: least + 1] == sorted(errors[: least + 1], reverse=True)
        assert errors[least:] == sorted(errors[least:])
        assert solved.ridge == RIDGES[least]
        _check(result, start, solved.node, goal, x=x, ridge=solved.ridge)
    assert len({solved.ridge for solved in done.record}) > 1


def test_with_too_few_samples_to_hold_any_out_the_ridge_is_fixed() -> None:
    aligned = trace(edges(chain, X), X[:2])
    done = Reconstruct(aligned, X[:4], progress=False).run(Interpolate()(aligned))
    assert {solved.ridge for solved in done.record} == {RIDGES[START]}
    equal_weights(done.program, _solved(aligned, X[:4], ridge=RIDGES[START]))


def test_what_is_said_of_each_layer() -> None:
    aligned = trace(edges(chain, X), X[:2])
    start = Interpolate()(aligned)
    done = Reconstruct(aligned, X, ridge=RIDGE, progress=False).run(start)
    values = node_values(done.program, X)
    for solved in done.record:
        form, source, matrix, bias = _map(start, solved.node)
        rows, goals = form.rows(values[source]), form.goals(_goal(aligned, solved.node))
        assert bias is not None
        spread = (goals - goals.mean(1, keepdim=True)).square().sum()
        before = (rows @ matrix + bias[:, None] - goals).square().sum() / spread
        after = (form.goals(values[solved.node]) - goals).square().sum() / spread
        assert solved.ridge == RIDGE
        assert abs(solved.before - before) < EXACT
        assert abs(solved.after - after) < EXACT
    assert done.record[1].after < done.record[1].before


@pytest.mark.parametrize("centre", ["own", "references"])
def test_what_the_ridge_draws_to(centre: str) -> None:
    aligned = trace(edges(normed(*NORMED["conv"][:2]), X), X[:2])
    first = aligned.select(0)
    result = _solved(aligned, start=first, centre=centre, weights=0.3, ridge=0.5)
    for node, goal, norm in (
        ("conv2d", "conv2d", None),
        ("conv2d_1", "batch_norm", "norm"),
        ("linear", "linear", None),
    ):
        form, source, matrix, bias = _map(result, node, norm)
        maps = [_map(aligned.select(edge), node, norm)[2:] for edge in range(2)]
        shares = [1.0, 0.0] if centre == "own" else [0.7, 0.3]
        before, shift = (_mean([pair[k] for pair in maps], shares) for k in range(2))  # type: ignore[misc]
        rows, goals = form.rows(node_values(result, X)[source]), form.goals(_goal(aligned, goal, shares=[0.7, 0.3]))
        close_solutions((matrix, bias), literal_solution(rows, goals, before, shift, None, 0.5))


def test_rounds_start_from_the_last_result() -> None:
    aligned = trace(edges(deep, X), X[:2])
    once = _solved(aligned)
    equal_weights(_solved(aligned, rounds=2), _solved(aligned, start=once))
    _differs(_solved(aligned, rounds=2), once, "fc.weight")


# data -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [deep, twice, mixed, chain])
def test_values_that_wait_on_disk_change_nothing(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    aligned = trace(edges(build, X), X[:2])
    data, written, append = X.split(5), [0], Spill._append

    def counted(self: Spill, storage: torch.UntypedStorage) -> Any:
        written[0] += 1
        return append(self, storage)

    monkeypatch.setattr(Spill, "_append", counted)
    for ridge in (RIDGE, None):
        results = [_solved(aligned, data, ridge=ridge, memory_limit=limit) for limit in (None, 0, 20_000)]
        for result in results[1:]:
            equal_weights(result, results[0])
    assert written[0]


@pytest.mark.parametrize("build", [deep, twice, chain])
@pytest.mark.parametrize("ridge", [RIDGE, None])
def test_batches_of_any_size_give_the_same(build: Build, ridge: float | None) -> None:
    aligned = trace(edges(build, X), X[:2])
    whole = _solved(aligned, ridge=ridge)
    for data in (X.split(5), [X[:1], X[1:3], X[3:]], [(x, torch.zeros(len(x))) for x in X.split(3)]):
        _close_weights(_solved(aligned, data, ridge=ridge), whole, 1e-9)
    _close_weights(_solved(aligned, iter(X.split(7)), ridge=ridge), whole, 1e-9)
    equal_weights(_solved(aligned, [X, images(9, 6, seed=8).double()], ridge=ridge, max_samples=16), whole)
    _differs(_solved(aligned, X[:11], ridge=ridge), whole, "fc.weight")


def test_random_rows_are_noted() -> None:
    aligned = trace(edges(chain, X), X[:2])
    whole, all_rows, few = (_solved(aligned, max_rows=rows) for rows in (None, 10**6, 12))
    note = "reconstruction: at most 12 random rows of each batch were read"
    assert few.notes == (note,)
    assert not whole.notes
    _close_weights(all_rows, whole, 1e-9)
    _differs(few, whole, "fc.weight")
    equal_weights(few, _solved(aligned, max_rows=12))


def test_nothing_that_was_given_is_changed() -> None:
    aligned = trace(edges(deep, X), X[:2])
    start, data = Interpolate()(aligned), X.clone()
    masks = {"a.weight": torch.rand(4, 5, 3, 3) < 0.5}
    before = [{name: tensor.clone() for name, tensor in own.items()} for own in (*aligned.weights, *start.weights)]
    result = _solved(aligned, data, start, masks=masks, follow=1, rounds=2)
    for own, old in zip((*aligned.weights, *start.weights), before):
        assert all(torch.equal(own[name], tensor) for name, tensor in old.items())
    assert torch.equal(data, X)
    _differs(result, start, "fc.weight")
    assert result.graph is start.graph
    assert {name: (t.shape, t.dtype) for name, t in result.weights[0].items()} == {
        name: (t.shape, t.dtype) for name, t in start.weights[0].items()
    }


def test_single_precision_comes_near() -> None:
    models = edges(deep, X)
    exact = _solved(trace(models, X[:2]))
    single = _solved(trace([model.float() for model in models], X[:2].float()), X.float())
    assert all(tensor.dtype == torch.float32 for tensor in single.weights[0].values() if tensor.is_floating_point())
    close(single(X.float()).double(), exact(X), 1e-3)


# references -----------------------------------------------------------------------------------------------------------


def perceptron(width: int) -> Build:
    return lambda: nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3))


def test_references_are_carried_to_the_networks_channels() -> None:
    """An index of channels, a matrix, and their shares."""
    student, wide, narrow = (
        trace(edges(perceptron(width), VECTORS, 1, seed)[0], VECTORS[:2]) for seed, width in enumerate((3, 6, 4))
    )
    index, matrix = torch.tensor([4, 0, 2]), drawn(3, 4)

    def chosen(node: str, dim: int) -> Tensor | None:
        return index if (node, dim) == ("linear", 1) else None

    def mixed_up(node: str, dim: int) -> Tensor | None:
        return matrix if (node, dim) == ("linear", 1) else None

    references = [Reference(wide, 0.4, chosen), Reference(narrow, 0.6, mixed_up)]
    result = Reconstruct(references, VECTORS, ridge=RIDGE, progress=False)(student)
    one, two = (node_values(reference, VECTORS) for reference in (wide, narrow))
    hidden = 0.4 * one["linear"][:, index] + 0.6 * _row_by_row(two["linear"], matrix)
    _check(result, student, "linear", hidden, x=VECTORS)
    _check(result, student, "linear_1", 0.4 * one["linear_1"] + 0.6 * two["linear_1"], x=VECTORS)
    _differs(result, student, "0.weight")


def _row_by_row(value: Tensor, matrix: Tensor) -> Tensor:
    return torch.stack([matrix @ row for row in value])


def test_calls_that_no_reference_has_keep_their_weights() -> None:
    shorter, longer = (
        trace(edges(build, VECTORS, 1, seed)[0], VECTORS[:2])
        for seed, build in enumerate(
            (perceptron(4), lambda: nn.Sequential(*perceptron(4)().children(), nn.Linear(3, 2)))
        )
    )
    result = Reconstruct([Reference(shorter)], VECTORS, ridge=RIDGE, progress=False)(longer)
    assert torch.equal(result.weights[0]["3.weight"], longer.weights[0]["3.weight"])
    for node in ("linear", "linear_1"):
        _check(result, longer, node, node_values(shorter, VECTORS)[node], x=VECTORS)


def test_a_reference_of_the_same_channels_comes_back() -> None:
    aligned = trace(edges(deep, X), X[:2])
    result = Reconstruct([Reference(aligned.select(1))], X, ridge=1e-9, progress=False)(aligned.select(0))
    close(result(X), aligned.select(1)(X), 1e-5)
    assert (aligned.select(0)(X) - aligned.select(1)(X)).abs().max() > 0.1, "negative control"


def test_what_is_refused() -> None:
    aligned = trace(edges(chain, X), X[:2])
    merged = Interpolate()(aligned)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"ridge": -1.0}, "ridge"), ({"ridge": float("nan")}, "ridge"), ({"goals": "mean"}, "goals"),
        ({"centre": "zero"}, "centre"), ({"rounds": 0}, "rounds"), ({"max_rows": 0}, "max_rows"),
        ({"weights": [0.5, 0.6]}, "sum to 1"), ({"weights": [1.0]}, "1 weights for 2"),
    ]  # fmt: skip
    for options, match in wrong:
        with pytest.raises(ArgumentError, match=match):
            Reconstruct(aligned, X, **options)
    for options, match in (
        ({"follow_edge": 2}, "follow_edge=2"),
        ({"follow_edge": -1}, "follow_edge"),
        ({"follow": 9}, "9"),
    ):
        with pytest.raises(ArgumentError, match=match):
            _solved(aligned, start=merged, **options)
    with pytest.raises(ArgumentError, match="reference"):
        Reconstruct([], X)(merged)
    with pytest.raises(PassError, match="merged network"):
        _solved(aligned, start=aligned)

"""The activation behind a layer is the whole function, however it is written, for REPAIR and the diagnosis alike."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vfx
from vfx.analyse.activations import Activation
from vfx.analyse.layer_view import layer_views
from vfx.diagnosis.taps import layer_taps
from vfx.program import Execution, Program

Function = Callable[[Tensor], Tensor]

FUNCTIONS: dict[str, Function] = {
    "relu": torch.relu,
    "swish": lambda h: h * torch.sigmoid(h),
    "swish turned round": lambda h: torch.sigmoid(h) * h,
    "quick gelu": lambda h: h * torch.sigmoid(1.702 * h),
    "tanh gelu": lambda h: 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))),
    "erf gelu": lambda h: 0.5 * h * (1 + torch.erf(h / math.sqrt(2))),
    "hardswish": lambda h: h * F.relu6(h + 3) / 6,
    "mish": lambda h: h * torch.tanh(F.softplus(h)),
    "clamp": lambda h: h.clamp(0, 6),
    "clamp from below": lambda h: h.clamp_min(0),
    "sine": lambda h: torch.sin(30 * h),
    "snake": lambda h: h + torch.sin(h) ** 2,
    "softsign": lambda h: h / (1 + h.abs()),
    "squared relu": lambda h: F.relu(h).square(),
    "maximum": lambda h: torch.maximum(h, torch.zeros_like(h)),
    "elu": lambda h: torch.where(h > 0, h, torch.exp(h) - 1),
    "gate by sign": lambda h: h * (h > 0),
    "gaussian": lambda h: torch.exp(-h * h),
    "log sigmoid": lambda h: torch.log(torch.sigmoid(h)),
    "in place": lambda h: h.clone().sigmoid_().mul_(2),
}


class Plain(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm, self.function = nn.Identity(), function

    def behind(self, x: Tensor) -> Tensor:
        """What the first layer hands on."""
        return self.function(self.norm(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.second(self.behind(x))))


class Normed(Plain):
    def __init__(self, function: Function) -> None:
        super().__init__(function)
        self.norm = nn.LayerNorm(8)


class Scaled(Plain):
    """A gain behind the activation is no part of it."""

    def __init__(self, function: Function) -> None:
        super().__init__(function)
        self.gain = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.second(self.gain * self.behind(x))))


class Read(Plain):
    """The layer's output goes on beside its activation, as a stream does."""

    def forward(self, x: Tensor) -> Tensor:
        stream = self.first(x)
        return self.last(stream + self.second(self.function(stream)))


class Summed(Plain):
    """The second layer's output meets the stream in front of the activation."""

    def forward(self, x: Tensor) -> Tensor:
        stream = self.behind(x)
        return self.last(self.function(stream + self.second(stream)))


def traced(kind: type[Plain], name: str) -> tuple[Plain, Program, Tensor]:
    torch.manual_seed(0)
    model = kind(FUNCTIONS[name]).double().eval()
    return model, vfx.trace(model, torch.randn(2, 5, dtype=torch.float64)), torch.randn(64, 5, dtype=torch.float64)


def value_of(program: Program, wanted: str, x: Tensor) -> Tensor:
    run = Execution(program.graph, program.weights[0], [x])
    with torch.no_grad():
        return next(value for node, value in iter(run.step, None) if node.name == wanted)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", [Plain, Normed, Scaled])
def test_both_find_the_end_of_the_function(kind: type[Plain], name: str) -> None:
    model, program, x = traced(kind, name)
    found = next(iter(layer_views(program).values())).activation
    assert isinstance(found, Activation)
    torch.testing.assert_close(value_of(program, found.node.name, x), model.behind(x).detach())
    tap = next(iter(layer_taps(program).values()))
    assert tap.activation is found.node


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_diagnosis_reads_what_the_layer_hands_on(name: str) -> None:
    model, program, x = traced(Plain, name)
    row = vfx.diagnose(program, program, data=[x], match=None, progress=False).rows[0]
    with torch.no_grad():
        handed_on, at_zero = model.behind(x), model.behind(torch.zeros(1, 5, dtype=torch.float64))
    assert row.feature == pytest.approx(float((handed_on - at_zero).norm(dim=1).mean()))
    assert row.zero_share == pytest.approx(float((handed_on == 0).double().mean()))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_streams_beside_and_sums_in_front(name: str) -> None:
    model, program, x = traced(Read, name)
    tap = next(iter(layer_taps(program).values()))
    assert tap.activation is not None
    torch.testing.assert_close(value_of(program, tap.activation.name, x), model.behind(x).detach())
    assert isinstance(next(iter(layer_views(program).values())).activation, str)  # REPAIR must not change the stream

    model, program, x = traced(Summed, name)
    taps = list(layer_taps(program).values())
    stream = model.behind(x)
    summed = model.function(stream + model.second(stream)).detach()
    assert taps[1].activation is not None
    torch.testing.assert_close(value_of(program, taps[1].activation.name, x), summed)


@pytest.mark.parametrize("pool", [nn.MaxPool1d(2), nn.AvgPool1d(2), nn.AdaptiveAvgPool1d(3)])
def test_a_pool_in_front_of_the_activation_is_walked_through(pool: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), pool, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double().eval()
    x = torch.randn(2, 2, 10, dtype=torch.float64)
    model(x)
    program = vfx.trace(model, x)
    found = next(iter(layer_views(program).values())).activation
    assert isinstance(found, Activation)
    assert found.channel == 1
    torch.testing.assert_close(value_of(program, found.node.name, x), model[:3](x).detach())
    assert next(iter(layer_taps(program).values())).activation is found.node

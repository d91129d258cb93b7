"""Emitted modules are made of torch's layers: what reads, replaces or watches layers works on them as on the user's."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import close, edges, images, lively
from micro_models import net
from torch import Tensor, fx, nn
from torch.ao.nn.quantized.dynamic import Linear as QuantisedLinear

import vfx
from vfx.api import trace
from vfx.emit.layers import KINDS, layer_of
from vfx.emit.module import graph_module
from vfx.operators import REGISTRY, operator_of
from vfx.program import Program

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs, momentum=None)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs, eps=1e-3)
        self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.down(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
        self.position, self.drop = nn.Parameter(torch.randn(1, 6, 8)), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            self.qkv(self.norm(x + self.position)).reshape(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        )
        weights = (q @ k.transpose(-2, -1) / 2).softmax(-1)
        return x + self.drop(self.proj((weights @ v).transpose(1, 2).reshape(batch, length, width)))


def _plain() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 5, bias=False), nn.PReLU(5))


def _residual() -> nn.Module:
    return nn.Sequential(Block(3, 6, 1), Block(6, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def _attention() -> nn.Module:
    return nn.Sequential(Attention(), Attention(), nn.Flatten(), nn.Linear(48, 3))


def _images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, (3, 2), (2, 1), (1, 0), dilation=(1, 2)), nn.GroupNorm(2, 8), nn.GELU(),
        nn.Conv2d(8, 8, 3, padding="same", groups=8), nn.InstanceNorm2d(8, affine=True), nn.Dropout2d(0.2),
        nn.ConvTranspose2d(8, 4, 3, 2, 1, output_padding=1, groups=2), nn.BatchNorm2d(4, affine=False),
        nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"), nn.InstanceNorm2d(2, track_running_stats=True),
        nn.BatchNorm2d(2, track_running_stats=False),
    )  # fmt: skip


def _signals() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 6, 3, 2), nn.BatchNorm1d(6), nn.ConvTranspose1d(6, 4, 4, 2, bias=False), nn.Dropout1d(0.5),
        nn.Unflatten(1, (2, 2, 1)), nn.Flatten(2, 3), nn.Unflatten(2, (1, 2)), nn.Conv3d(2, 4, (1, 2, 3)),
        nn.BatchNorm3d(4), nn.ConvTranspose3d(4, 2, 1),
    )  # fmt: skip


def _text() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(11, 6, padding_idx=2), nn.LayerNorm((6,), bias=False), nn.Linear(6, 8), nn.RMSNorm(8),
        nn.LayerNorm((5, 8)),
    )  # fmt: skip


def _recurrent() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        sequence, (hidden, cell) = self.lstm(x)
        sequence, last = self.gru(sequence + hidden[-1].repeat(1, 2)[:, None])
        sequence, _ = self.rnn(sequence + last[0][:, None] + cell[0, :, None, :1])
        state, memory = self.cell(sequence[:, 0], (sequence[:, 1], sequence[:, 2]))
        return self.basic(self.step(state, memory), state)  # type: ignore[no-any-return]

    return net(
        forward,
        lstm=nn.LSTM(8, 6, 2, dropout=0.4, bidirectional=True, batch_first=True, proj_size=3),
        gru=nn.GRU(6, 5, batch_first=True),
        rnn=nn.RNN(5, 4, nonlinearity="relu", bias=False, batch_first=True),
        cell=nn.LSTMCell(4, 4),
        step=nn.GRUCell(4, 4),
        basic=nn.RNNCell(4, 4, bias=False),
    )


def _shared() -> nn.Module:
    """One layer called twice, and names that operators have."""
    return net(
        lambda self, linear: self.bilinear(self.add(self.relu(F.relu(self.add(linear)))), linear),
        add=nn.Linear(8, 8), relu=nn.BatchNorm1d(8), bilinear=nn.Bilinear(8, 8, 3),
    )  # fmt: skip


def _tokens(*shape: int) -> Tensor:
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(0))


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "plain": (_plain, _normal(4, 8)),
    "residual": (_residual, _normal(4, 3, 8, 8)),
    "attention": (_attention, _normal(4, 6, 8)),
    "images": (_images, _normal(4, 3, 8, 8)),
    "signals": (_signals, _normal(4, 3, 9)),
    "text": (_text, _tokens(4, 5)),
    "recurrent": (_recurrent, _normal(4, 5, 8)),
    "shared": (_shared, _normal(4, 8)),
}
SCRIPTED = ("plain", "residual", "attention", "images", "signals", "text", "recurrent", "shared")


class Emitted:
    """A user's network, its Program, the module made of it, and inputs."""

    def __init__(self, name: str):
        build, self.x = NETWORKS[name]
        torch.manual_seed(0)
        self.model = lively(build(), self.x)
        self.program = trace(self.model, self.x)
        self.module = graph_module(self.program)

    def layers(self, module: nn.Module) -> dict[str, nn.Module]:
        """Every layer that has tensors of its own, by its path."""
        return {
            path: layer
            for path, layer in module.named_modules()
            if type(layer).__module__.startswith("torch.nn.modules.") and type(layer) is not nn.Module
            if layer._parameters | layer._buffers
        }


@pytest.fixture(scope="module", params=NETWORKS)
def emitted(request: pytest.FixtureRequest) -> Emitted:
    return Emitted(request.param)


def _on_tensors(program: Program, module: nn.Module) -> Program:
    """The Program with the very tensors of a module: calls on loose tensors, as they were captured."""
    return program.with_weights([{**dict(module.named_parameters()), **dict(module.named_buffers())}])


@torch.no_grad()
def test_the_bits_are_those_of_calls_on_loose_tensors(emitted: Emitted) -> None:
    for x in (emitted.x, torch.cat([emitted.x, emitted.x.flip(0)])):
        assert torch.equal(emitted.module(x), _on_tensors(emitted.program, emitted.module)(x))
    close(emitted.module(emitted.x), emitted.model(emitted.x), 1e-5)


def test_every_layer_is_the_users_under_the_users_name(emitted: Emitted) -> None:
    wanted, found = emitted.layers(emitted.model), emitted.layers(emitted.module)
    for path, layer in wanted.items():
        padded = isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros"  # a call of its own pads
        assert type(found[path]) is type(layer)
        assert padded or repr(found[path]) == repr(layer)
        assert path in str(emitted.module) or "." in path
    assert found.keys() == wanted.keys()
    drops = {path: repr(m) for path, m in emitted.model.named_modules() if "Dropout" in type(m).__name__}
    assert drops == {path: repr(m) for path, m in emitted.module.named_modules() if "Dropout" in type(m).__name__}


def test_names_and_values_of_the_state_are_the_users(emitted: Emitted) -> None:
    own, found = emitted.model.state_dict(), emitted.module.state_dict()
    assert {name for name in found if not name.startswith("_folded")} == own.keys()
    assert all(torch.equal(found[name], own[name]) for name in own)
    assert {n for n, _ in emitted.module.named_parameters()} == {n for n, _ in emitted.model.named_parameters()}


def test_hooks_fire_on_every_layer(emitted: Emitted) -> None:
    fired = list[str]()
    layers = emitted.layers(emitted.module)
    hooks = [m.register_forward_hook(lambda *_, path=path: fired.append(path)) for path, m in layers.items()]
    emitted.module(emitted.x)
    for hook in hooks:
        hook.remove()
    assert set(fired) == layers.keys()


def test_training_mode_is_that_of_the_users_network(emitted: Emitted) -> None:
    twins = copy.deepcopy(emitted.model).train(), copy.deepcopy(emitted.module).train()
    outputs = []
    for twin in twins:
        torch.manual_seed(3)
        outputs.append(twin(emitted.x))
    close(outputs[1], outputs[0], 1e-5)
    first, second = (twin.state_dict() for twin in twins)
    for name in first:
        close(second[name], first[name], 1e-6)
    if any("Dropout" in type(m).__name__ for m in emitted.model.modules()):
        assert not torch.equal(twins[1](emitted.x), outputs[1])
    outputs[1].sum().backward()
    assert all(p.grad is not None for p in twins[1].parameters())


def test_every_linear_layer_is_quantised(emitted: Emitted) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces another package
        small = torch.ao.quantization.quantize_dynamic(emitted.module, {nn.Linear})
    linear = {path for path, layer in emitted.layers(emitted.model).items() if type(layer) is nn.Linear}
    assert {path for path, layer in small.named_modules() if isinstance(layer, QuantisedLinear)} == linear
    with torch.no_grad():
        close(small(emitted.x), emitted.module(emitted.x), 0.1)
        assert not linear or not torch.equal(small(emitted.x), emitted.module(emitted.x))


def _tree(module: nn.Module) -> str:
    """What is printed of the modules inside."""
    return str(module).partition("def forward")[0].partition("\n")[2]


def test_copies_pickles_precision_and_compilation(emitted: Emitted) -> None:
    with torch.no_grad():
        expected = emitted.module(emitted.x)
        for twin in (copy.deepcopy(emitted.module), pickle.loads(pickle.dumps(emitted.module))):
            assert torch.equal(twin(emitted.x), expected)
            assert list(twin.state_dict()) == list(emitted.module.state_dict())
            assert _tree(twin) == _tree(emitted.module)
        with torch._dynamo.config.patch(allow_rnn=True):  # the compiler takes no recurrent layers unasked
            whole = torch.compile(emitted.module, fullgraph=True, backend="eager")
            assert torch.equal(whole(emitted.x), expected)
        exact = copy.deepcopy(emitted.module).to(torch.float64)
        x = emitted.x.double() if emitted.x.is_floating_point() else emitted.x
        close(exact(x), expected.double(), 1e-5)
        assert exact(x).dtype == torch.float64


@pytest.mark.parametrize("name", SCRIPTED)
def test_scripted_modules_give_the_same(name: str) -> None:
    emitted = Emitted(name)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch announces the end of TorchScript
        scripted = torch.jit.script(emitted.module)
        close(scripted(emitted.x), emitted.module(emitted.x), 1e-6)


def test_the_table_names_no_class_in_vain() -> None:
    """Every class of the table is met by one of the networks, and is one that the registry names."""
    met = {operator_of(node).module for build, x in NETWORKS.values() for node in trace(build().eval(), x).graph.nodes}
    assert met >= set(KINDS)
    named = {entry.module for entry in REGISTRY.values() if entry.module and not entry.is_dropout}
    assert named == set(KINDS)


# what is no layer's plain call ----------------------------------------------------------------------------------------


def _twice(self: Any, x: Tensor) -> Tensor:
    return F.linear(self.a(x), self.a.weight.t())  # type: ignore[no-any-return]


def _padded(self: Any, x: Tensor) -> Tensor:
    wide = F.conv1d(x[:, None], self.a.weight, self.a.bias, padding=1)
    return self.a(x[:, None]) + wide[..., 1:-1]  # type: ignore[no-any-return]


def _of_two(self: Any, x: Tensor) -> Tensor:
    return F.linear(x, self.a.weight, self.c.bias)


def _with_more() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.lora = nn.Linear(8, 8, bias=False)
    layer.scale = nn.Parameter(torch.tensor(0.5))
    return net(lambda self, x: self.a(x) + self.a.scale * self.a.lora(x), a=layer)


def _buffered() -> nn.Module:
    """A kernel that is not trained stays a buffer."""
    kernel = nn.Module()
    kernel.register_buffer("weight", _normal(8, 8))
    return net(lambda self, x: F.linear(x, self.a.weight), a=kernel)


LOOSE: dict[str, Callable[[], nn.Module]] = {
    "computed weight": lambda: net(lambda self, x: F.linear(x, self.a.weight * 2, self.a.bias), a=nn.Linear(8, 8)),
    "read elsewhere": lambda: net(_twice, a=nn.Linear(8, 8)),
    "penalty": lambda: net(lambda self, x: self.a(x) * self.a.weight.mean(), a=nn.Linear(8, 8)),
    "two paddings": lambda: net(_padded, a=nn.Conv1d(1, 1, 3)),
    "more tensors": _with_more,
    "buffer": _buffered,
    "two owners": lambda: net(_of_two, a=nn.Linear(8, 8), c=nn.Linear(8, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOSE)
@torch.no_grad()
def test_other_calls_stay_on_loose_tensors(name: str) -> None:
    torch.manual_seed(0)
    model, x = LOOSE[name]().eval(), _normal(4, 8)
    program = trace(model, x)
    module = graph_module(program)
    assert type(module.get_submodule("a")) is nn.Module
    assert set(module.state_dict()) == set(program.names())
    assert torch.equal(module(x), _on_tensors(program, module)(x))
    assert [n for n, _ in module.named_buffers()] == [n for n, _ in model.named_buffers()]


def test_what_else_stands_beside_a_loose_call_is_a_layer() -> None:
    """Negative control of the above: the same network with a plain call."""
    module = graph_module(trace(net(lambda self, x: self.a(x), a=nn.Linear(8, 8)).eval(), _normal(4, 8)))
    assert type(module.get_submodule("a")) is nn.Linear
    more = graph_module(trace(_with_more().eval(), _normal(4, 8)))
    assert type(more.get_submodule("a.lora")) is nn.Linear


def test_a_tied_weight_is_one_parameter() -> None:
    model = net(lambda self, t: self.head(self.embed(t).relu()), embed=nn.Embedding(11, 6), head=nn.Linear(6, 11))
    model.head.weight = model.embed.weight
    module = graph_module(trace(model.eval(), _tokens(4, 5)))
    close(module(_tokens(4, 5)), model(_tokens(4, 5)), 1e-6)
    assert len(list(module.parameters())) == 2
    assert set(module.state_dict()) == {"embed.weight", "head.bias"}


def test_a_stride_that_is_computed_is_no_constructors_argument() -> None:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.get_attr("a.weight")
    size = graph.call_function(torch.ops.aten.sym_size.int, (x, 2))
    calls = [graph.call_function(torch.ops.aten.conv1d.default, (x, weight, None, [s])) for s in (2, size)]
    fixed, computed = (layer_of(call, {"a.weight": (4, 3, 5)}) for call in calls)
    assert fixed is not None
    assert fixed.options["stride"] == (2,)
    assert computed is None


def test_a_network_that_is_one_layer() -> None:
    module = graph_module(trace(nn.Linear(8, 3), _normal(4, 8)))
    assert set(module.state_dict()) == {"weight", "bias"}
    assert module(_normal(4, 8)).shape == (4, 3)


def test_making_modules_leaves_the_random_numbers_alone() -> None:
    program = trace(NETWORKS["recurrent"][0]().eval(), NETWORKS["recurrent"][1])
    state = torch.random.get_rng_state()
    graph_module(program)
    assert torch.equal(state, torch.random.get_rng_state())


# results --------------------------------------------------------------------------------------------------------------


def test_branches_are_submodules_whose_layers_are_watched() -> None:
    x = images(8, 8)
    models = edges(_residual, x)
    result = vfx.merge(models, x[:2], preserve=2, match="weight", progress=False)
    assert isinstance(result.module, fx.GraphModule)
    for edge in range(2):
        layer = result.module.get_submodule(f"branches.{edge}.0.conv1")
        assert repr(layer) == repr(models[0].get_submodule("0.conv1"))
    norm = result.module.get_submodule("branches.1.0.bn1")
    assert norm.momentum is None
    fired = list[str]()
    layers = {p: m for p, m in result.module.named_modules() if m._parameters or m._buffers}
    for path, layer in layers.items():
        layer.register_forward_hook(lambda *_, path=path: fired.append(path))
    result.module(x)
    assert sorted(fired) == sorted(layers)
    assert len(layers) > len([m for m in models[0].modules() if m._parameters])
    assert "(conv1): Conv2d(3, 6, kernel_size=(3, 3)" in str(result.module)
    assert len(repr(result).splitlines()) <= 10


def test_layers_can_be_replaced_as_lora_does() -> None:
    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear):
            super().__init__()
            self.base, self.down = base, nn.Linear(base.in_features, 2, bias=False)
            self.up = nn.Linear(2, base.out_features, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))  # type: ignore[no-any-return]

    emitted = Emitted("attention")
    module = copy.deepcopy(emitted.module)
    replaced = [path for path, layer in module.named_modules() if type(layer) is nn.Linear]
    for path in replaced:
        owner, _, leaf = path.rpartition(".")
        setattr(module.get_submodule(owner), leaf, Adapted(module.get_submodule(path)))  # type: ignore[arg-type]
    close(module(emitted.x), emitted.module(emitted.x), 1e-6)
    nn.init.ones_(module.get_submodule("1.proj").up.weight)  # type: ignore[union-attr,arg-type]
    assert not torch.allclose(module(emitted.x), emitted.module(emitted.x))
    assert len(replaced) == 5

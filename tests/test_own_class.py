"""Networks with fewer channels come back in the user's own class where its forward computes what was proved."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import close, images, network
from micro_models import net
from torch import Tensor, fx, nn

import vfx
import vfx.emit.module as module_module
import vfx.emit.own_class as own_class_module
from vfx.api import Result
from vfx.emit.kept_sizes import KeptSize, kept_sizes, needed, put
from vfx.emit.module import emit
from vfx.models import gpt_tiny, resnet20_bn, resnet20_ln, vgg16, vit_tiny


def _pruned(build: Callable[[], nn.Module], x: Any, **options: Any) -> tuple[nn.Module, Result]:
    torch.manual_seed(0)
    model = network(build, x) if isinstance(x, Tensor) and x.is_floating_point() else build().eval()
    return model, vfx.prune_structured(model, x, progress=False, **{"sparsity": 0.5} | options)


def _tokens(count: int = 3) -> Tensor:
    return torch.randint(0, 96, (count, 16), generator=torch.Generator().manual_seed(count))


def _torchvision(name: str, **options: Any) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    return models.get_model(name, num_classes=5, **options)  # type: ignore[no-any-return]


def _vgg() -> nn.Module:
    """torchvision's VGG with a small head."""
    model = _torchvision("vgg11_bn", init_weights=False)
    model.classifier = nn.Sequential(nn.Linear(512 * 49, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 5))
    return model


class Net(nn.Module):
    """Grouped, depthwise and transposed convolutions, and norms that keep the number of their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.grouped, self.depthwise = nn.Conv2d(16, 16, 3, groups=4), nn.Conv2d(16, 16, 3, groups=16)
        self.act, self.up = nn.PReLU(16), nn.ConvTranspose2d(16, 12, 2, 2, groups=2)
        self.bn, self.fc = nn.BatchNorm2d(12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.depthwise(self.grouped(F.relu(self.norm(self.stem(x))))))
        return self.fc(F.relu(self.bn(self.up(h))).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(96, 12), nn.LayerNorm(12)
        self.lstm, self.gru = nn.LSTM(12, 10, 2, batch_first=True, bidirectional=True), nn.GRU(20, 8, batch_first=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        sequence, _ = self.lstm(self.norm(self.embed(x)))
        return self.fc(self.gru(sequence)[0][:, -1])


class Heads(nn.Module):
    """Attention whose sizes are numbers of the module's own; ``longest`` merely equals one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_size, self.longest, self.scale = 4, 16, 16, 0.25
        self.embed, self.qkv, self.out = nn.Embedding(96, 24), nn.Linear(24, 192), nn.Linear(64, 24)
        self.fc = nn.Linear(24, 3)

    def forward(self, t: Tensor) -> Tensor:
        if t.shape[1] > self.longest:
            raise ValueError(f"at most {self.longest} tokens")
        x = self.embed(t)
        q, k, v = self.qkv(x).view(*t.shape, 3, self.heads, self.head_size).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.mT * self.scale).softmax(-1) @ v
        y = y.transpose(1, 2).reshape(*t.shape, self.heads * self.head_size)
        return self.fc((x + self.out(y)).mean(1))


OWN: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "torchvision resnet18": (lambda: _torchvision("resnet18"), images(2, 32)),
    "torchvision vgg11_bn": (_vgg, images(2, 32)),
    "torchvision mobilenet_v3": (lambda: _torchvision("mobilenet_v3_small"), images(2, 32)),
    "vgg16": (lambda: vgg16(width=0.25), images(4, 32)),
    "resnet20_bn": (lambda: resnet20_bn(width=0.5), images(4, 32)),
    "resnet20_ln": (lambda: resnet20_ln(width=0.5), images(4, 32)),
    "vit": (lambda: vit_tiny(width=0.25, depth=2), images(2, 32)),
    "gpt": (lambda: gpt_tiny(width=0.25, depth=2), _tokens()),
    "tied gpt": (lambda: gpt_tiny(width=0.25, depth=2, tied=True), _tokens()),
    "grouped": (Net, images(4, 8)),
    "recurrent": (Recurrent, _tokens()),
    "heads": (Heads, _tokens()),
}


@pytest.mark.parametrize("name", OWN)
@torch.no_grad()
def test_the_users_class_comes_back_smaller(name: str) -> None:
    build, x = OWN[name]
    model, result = _pruned(build, x)
    module = result.module
    assert type(module) is type(model)
    assert result.report.own_class
    assert "the user's own" in str(result.report)
    assert sum(p.numel() for p in module.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())
    assert module.state_dict().keys() == model.state_dict().keys()
    assert not module.training
    more = torch.cat([x, x.flip(0), x])  # another batch size than those of the proof
    close(module(more), result.program(more), 1e-5)
    twins = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    assert all(torch.equal(twin(x), module(x)) for twin in twins)


@pytest.mark.parametrize("name", ["grouped", "recurrent", "resnet20_bn"])
def test_the_layers_say_their_new_sizes(name: str) -> None:
    """Layers constructed from what is printed of them take the tensors."""
    _, result = _pruned(*OWN[name])
    for layer in result.module.modules():
        if isinstance(
            layer, (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm, nn.Embedding, nn.PReLU)
        ):
            twin = eval(repr(layer), vars(nn))
            assert repr(twin) == repr(layer)
            twin.load_state_dict(layer.state_dict())
        if isinstance(layer, (nn.LSTM, nn.GRU)):
            options = {"batch_first": True, "bidirectional": layer.bidirectional}
            twin = type(layer)(layer.input_size, layer.hidden_size, layer.num_layers, **options)
            twin.load_state_dict(layer.state_dict())


def test_the_users_model_stays_as_it_was() -> None:
    model = network(Net, images(4, 8))
    before, text = copy.deepcopy(model.state_dict()), repr(model)
    result = vfx.prune_structured(model, images(4, 8), sparsity=0.5, progress=False)
    assert type(result.module) is Net
    assert repr(model) == text
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_solved_and_normalized_networks_come_back_too() -> None:
    x = images(64, 32)
    model, result = _pruned(lambda: resnet20_bn(width=0.25), x, data=x, solve="least_squares", normalize="reset")
    assert type(result.module) is type(model)
    assert len(result.program.history) == 3
    with torch.no_grad():
        close(result(x), result.program(x), 1e-5)


def test_folded_channels_and_budgets_come_back_too() -> None:
    for options in ({"method": "fold"}, {"sparsity": None, "budget": {"flops": 0.5}}):
        _, result = _pruned(Net, images(4, 8), **options)
        assert type(result.module) is Net


def test_it_trains_and_is_pruned_again() -> None:
    x = images(4, 8)
    _, result = _pruned(Net, x)
    result.module.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in result.module.parameters())
    again = vfx.prune_structured(result.module.eval(), x, sparsity=0.5, progress=False)
    assert type(again.module) is Net
    twice = vfx.prune_structured(result.program, x, sparsity=0.5, progress=False)
    assert type(twice.module) is Net
    with torch.no_grad():
        close(twice(x), twice.program(x), 1e-5)


def test_a_state_dict_of_the_smaller_network_is_written_and_read(tmp_path: Path) -> None:
    x = images(4, 8)
    _, result = _pruned(Net, x)
    path = result.save(tmp_path / "small.safetensors")
    other = copy.deepcopy(result.module)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        assert torch.equal(vfx.load(path, other)(x), result(x))


@pytest.mark.filterwarnings("ignore::vfx.errors.ConfigNote")  # their heads have the stream's width
@pytest.mark.parametrize("name", ["GPT2", "Bert"])
def test_hugging_face_models_keep_their_output_class(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    if name == "GPT2":
        sizes = {"n_layer": 2, "n_head": 2, "n_embd": 48, "bos_token_id": None, "eos_token_id": None}
    config = getattr(transformers, f"{name}Config")(vocab_size=96, **sizes)
    model = getattr(transformers, f"{name}Model")(config).eval()
    call = {"input_ids": _tokens()[:, :10]}
    result = vfx.prune_structured(model, call, sparsity=0.5, progress=False)
    assert type(result.module) is type(model), result.report.class_reason
    assert type(result(**call)) is type(model(**call))
    assert sum(p.numel() for p in result.module.parameters()) < sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        close(result(**call).last_hidden_state, result.program(**call)["last_hidden_state"], 1e-5)


def test_numbers_that_merely_equal_a_size_stay() -> None:
    model, result = _pruned(*OWN["heads"])
    assert (result.module.head_size, result.module.longest) == (8, 16)
    assert model.head_size == 16
    guesses = kept_sizes(result.program)
    assert {(size.name, size.value) for size in guesses} == {("head_size", 8), ("longest", 8)}


def test_only_the_sizes_that_a_proof_needs_are_changed() -> None:
    sizes = [KeptSize("", name, Net, 1, name == "c") for name in "abc"]
    names = lambda found: "".join(size.name for size in found)  # noqa: E731
    assert names(needed(sizes, lambda some: "a" in names(some))) == "a"
    assert names(needed(sizes, lambda some: {"a", "c"} <= set(names(some)))) == "ac"
    assert names(needed(sizes, lambda some: "b" not in names(some) and "a" in names(some))) == "a"
    assert needed(sizes, lambda some: False) == []


@torch.no_grad()
def test_what_a_new_width_does_to_the_scale_of_attention_goes_into_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    build, x = OWN["vit"]
    _, result = _pruned(build, x)
    name = "blocks.0.attention.qkv.weight"
    mine, kept = result.state_dict()[name], result.program.weights[0][name]
    rows = len(mine) // 3
    close(mine[:rows], kept[:rows] * 0.5**0.5, 1e-6)
    assert torch.equal(mine[rows:], kept[rows:])
    monkeypatch.setattr(
        own_class_module, "with_default_scales", lambda program, edge, exact=False: program.weights[edge]
    )
    assert emit(result.program)[1].startswith("ViT differs from the graph")  # negative control


# what the class cannot be ---------------------------------------------------------------------------------------------


def _view(self: Any, x: Tensor) -> Tensor:
    return self.fc(F.relu(self.conv(x)).mean((2, 3)).view(-1, 16))  # type: ignore[no-any-return]


def _checked(self: Any, x: Tensor) -> Tensor:
    h = self.conv(x)
    assert h.shape[1] == 16, "sixteen channels"
    return self.fc(h.mean((2, 3)))  # type: ignore[no-any-return]


def _mean(self: Any, x: Tensor) -> Tensor:
    """The average over the channels, which are fewer in a smaller network: the graph keeps the number of before."""
    h = F.relu(self.conv(x)).mean((2, 3))
    return self.fc(h) + (h.sum(1) / h.shape[1])[:, None]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (_view, "Net.forward() does not run at the new sizes: mat1 and mat2 shapes cannot be multiplied"),
        (_checked, "Net.forward() does not run at the new sizes: sixteen channels"),
        (_mean, "Net differs from the graph by"),
    ],
)
def test_sizes_in_the_code_give_a_graphmodule_and_the_reason(forward: Any, reason: str) -> None:
    x = images(4, 8)
    _, result = _pruned(lambda: net(forward, conv=nn.Conv2d(3, 16, 3), fc=nn.Linear(16, 4)), x)
    assert isinstance(result.module, fx.GraphModule)
    assert type(result.module.get_submodule("conv")) is nn.Conv2d
    assert not result.report.own_class
    assert result.report.class_reason.startswith(reason)
    assert f"GraphModule: {reason[:20]}" in str(result.report)
    with torch.no_grad():
        close(result(x), result.program(x), 1e-5)


def test_added_parameters_and_named_outputs_are_no_class() -> None:
    x = images(4, 8)
    _, result = _pruned(Net, x)
    weights = dict(result.program.weights[0])
    graph = copy.deepcopy(result.program.graph)
    for node in graph.nodes:
        if node.target == "fc.bias":
            node.target = "fc.shift"
    other = replace(result.program, graph=graph, weights=({**weights, "fc.shift": weights["fc.bias"]},))
    module, reason = emit(other)
    assert (isinstance(module, fx.GraphModule), reason) == (True, "writing back to Net failed: Net has no fc.shift")
    named = replace(result.program, outputs=(0,))
    assert emit(named)[1] == "only outputs 0 are kept"
    assert emit(result.program)[1] == ""


def test_a_wrong_weight_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof compares real numbers: a class that is changed behind its back fails it."""
    _, result = _pruned(Net, images(4, 8))

    def nudged(program: Any, edge: int = 0, taking: Any = None) -> nn.Module:
        module = own_class_module.own_class(program, edge, taking)
        with torch.no_grad():
            module.get_parameter("fc.bias")[0] += 1e-5
        return module

    monkeypatch.setattr(module_module, "own_class", nudged)
    module, reason = emit(result.program)
    assert isinstance(module, fx.GraphModule)
    assert reason.startswith("Net differs from the graph by")


def test_a_size_is_set_on_a_copy() -> None:
    model = Heads()
    twin = put(copy.deepcopy(model), [KeptSize("", "heads", Heads, 2, True)])
    assert (model.heads, twin.heads) == (4, 2)

"""Numbering of conv and linear layers, which projections are shortcuts, and where a cut joins."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from conftest import images
from micro_models import conv, net
from test_matching import concatenated, depthwise, grouped, squeeze_excite
from torch import Tensor, nn

from vfx.analyse.layers import Layers
from vfx.api import layers, merge, trace
from vfx.errors import ArgumentError
from vfx.models import linear_net, resnet20_bn, resnet20_fixup, resnet20_ln, resnet20_plain, resnet32_bn, vgg16
from vfx.operators import output_axis


def _resnet_d() -> nn.Module:
    """The shortcut pools before it projects, as in ResNet-D."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        s = F.relu(self.stem(x))
        s = F.relu(self.two(F.relu(self.one(s))) + self.norm(self.project(self.pool(s))))
        return self.fc(s.mean((2, 3)))

    return net(
        forward,
        stem=conv(3, 4),
        one=nn.Conv2d(4, 5, 3, 2, 1),
        two=conv(5, 6),
        pool=nn.AvgPool2d(2),
        project=conv(4, 6, 1),
        norm=nn.BatchNorm2d(6),
        fc=nn.Linear(6, 2),
    )


def _parallel() -> nn.Module:
    """Two branches of one layer each that are added: neither is a shortcut of the other."""
    return net(lambda self, x: self.fc((self.a(x) + self.b(x)).mean((2, 3))), a=conv(3, 4), b=conv(3, 4, 1),
               fc=nn.Linear(4, 2))  # fmt: skip


def _twice() -> nn.Module:
    """One convolution called twice counts twice."""
    return net(lambda self, x: self.fc(self.b(F.relu(self.b(F.relu(self.a(x))))).mean((2, 3))), a=conv(3, 4),
               b=conv(4, 4), fc=nn.Linear(4, 2))  # fmt: skip


def _transposed() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(3, 4, 2, 2), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(5 * 14 * 14, 2)
    )


BASIC = {"layer2.0.downsample.0": 7, "layer3.0.downsample.0": 11, "layer4.0.downsample.0": 15}
BOTTLENECK = {
    "layer1.0.downsample.0": 4,
    "layer2.0.downsample.0": 13,
    "layer3.0.downsample.0": 25,
    "layer4.0.downsample.0": 43,
}
CIFAR = {"layer2.0.shortcut.0": 9, "layer3.0.shortcut.0": 15}

# name: (network, picture size, L, shortcuts with the number of the layer they meet)
TABLE: dict[str, tuple[Callable[[], nn.Module], int, int, dict[str, int]]] = {
    "vgg16": (lambda: vgg16(width=0.0625), 32, 14, {}),
    "resnet20_bn": (lambda: resnet20_bn(width=0.25), 32, 20, CIFAR),
    "resnet20_ln": (lambda: resnet20_ln(width=0.25), 32, 20, CIFAR),
    "resnet20_plain": (lambda: resnet20_plain(width=0.25), 32, 20, CIFAR),
    "resnet20_fixup": (lambda: resnet20_fixup(width=0.25), 32, 20, CIFAR),
    "resnet32_bn": (
        lambda: resnet32_bn(width=0.25),
        32,
        32,
        {"layer2.0.shortcut.0": 13, "layer3.0.shortcut.0": 23},
    ),
    "resnet18": (tv.resnet18, 32, 18, BASIC),
    "resnet50": (tv.resnet50, 32, 50, BOTTLENECK),
    "densenet": (lambda: tv.DenseNet(8, (2, 2), 8), 32, 11, {}),
    "resnet_d": (_resnet_d, 8, 4, {"project": 3}),
    "parallel": (_parallel, 8, 3, {}),
    "twice": (_twice, 8, 4, {}),
    "concatenated": (concatenated, 8, 4, {}),
    "depthwise": (depthwise, 8, 5, {}),
    "grouped": (grouped, 8, 4, {}),
    "squeeze_excite": (squeeze_excite, 8, 5, {}),
    "transposed": (_transposed, 8, 3, {}),
    "linear": (lambda: linear_net(8, 8, 192), 8, 8, {}),
    "linear_residual": (lambda: linear_net(5, 8, 192, residual=True), 8, 5, {}),
}
_found: dict[str, Layers] = {}


def _layers(name: str) -> Layers:
    if name not in _found:
        build, size, *_ = TABLE[name]
        _found[name] = layers(build(), images(2, size))
    return _found[name]


@pytest.mark.parametrize("name", TABLE)
def test_layers_are_numbered_in_execution_order(name: str) -> None:
    _, _, total, shortcuts = TABLE[name]
    found = _layers(name)
    assert len(found) == total
    assert {layer.fqn: layer.number for layer in found if layer.shortcut} == shortcuts
    assert [layer.number for layer in found if not layer.shortcut] == list(range(1, total + 1))


@pytest.mark.parametrize("name", ["resnet20_bn", "resnet18", "transposed", "linear"])
def test_the_channel_axis_is_that_of_the_weight(name: str) -> None:
    found = _layers(name)
    weights = found.program.weights[0]
    for layer in found:
        weight = weights[layer.fqn + ".weight"]
        size = weight.shape[1] if "transpose" in layer.operator else weight.shape[0]
        assert found.program.node(layer.node).meta["val"].shape[layer.channel] == size


def test_names_follow_execution_and_print() -> None:
    found = _layers("resnet20_bn")
    by_number = {layer.number: layer.fqn for layer in found if not layer.shortcut}
    assert by_number[1] == "conv1"
    assert by_number[2] == "layer1.0.conv1"
    assert by_number[8] == "layer2.0.conv1"
    assert by_number[20] == "fc"
    text = str(found)
    assert "20 layers" in text
    assert "aten.conv2d shortcut" in text
    assert "(9)" in text


JOINS = [
    # inside a residual stage the stream crosses as well as the branch
    ("resnet20_bn", 1, "preactivation", ["conv2d"]),
    ("resnet20_bn", 2, "preactivation", ["relu", "conv2d_1"]),
    ("resnet20_bn", 3, "preactivation", ["relu", "conv2d_2"]),
    ("resnet20_bn", 8, "preactivation", ["relu_6", "conv2d_7"]),
    ("resnet20_bn", 9, "preactivation", ["conv2d_8", "conv2d_9"]),  # the shortcut's convolution belongs to layer 9
    ("resnet20_bn", 20, "preactivation", ["linear"]),
    ("resnet20_bn", 1, "activation", ["relu"]),
    ("resnet20_bn", 2, "activation", ["relu", "relu_1"]),
    ("resnet20_bn", 3, "activation", ["relu_2"]),
    ("resnet20_bn", 9, "activation", ["relu_8"]),
    ("vgg16", 0, "preactivation", []),
    ("vgg16", 0, "activation", []),
    ("vgg16", 2, "preactivation", ["conv2d_1"]),
    ("vgg16", 2, "activation", ["max_pool2d"]),
    ("vgg16", 13, "activation", ["flatten"]),
    ("concatenated", 2, "preactivation", ["relu", "conv2d_1"]),
    ("concatenated", 2, "activation", ["relu", "relu_1", "cat_1"]),
    ("resnet_d", 3, "preactivation", ["conv2d_2", "conv2d_3"]),
]


@pytest.mark.parametrize(("name", "number", "join", "expected"), JOINS)
def test_joins_of_a_cut(name: str, number: int, join: str, expected: list[str]) -> None:
    cut = _layers(name).cut(number, join)  # type: ignore[arg-type]
    assert [node.name for node in cut.joins] == expected


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("join", ["preactivation", "activation"])
def test_a_cut_splits_the_parameters_at_its_layer(name: str, join: str) -> None:
    """Layers up to the cut stand in the branch, later ones in the rest, and nothing of the rest feeds the branch."""
    found = _layers(name)
    for number in range(len(found) + 1):
        cut = found.cut(number, join)  # type: ignore[arg-type]
        inside = {layer.node for layer in found if layer.node in {node.name for node in cut.branch}}
        assert inside == {layer.node for layer in found if layer.number <= number}
        assert all(join in cut.branch for join in cut.joins)
        feeding = {a for node in cut.branch for a in node.all_input_nodes}
        assert all(a in cut.branch or a.op in ("placeholder", "get_attr") or a.op == "call_function" for a in feeding)
        assert bool(cut.branch) == (number > 0)


def test_a_merged_network_keeps_the_numbers_of_its_edges() -> None:
    x = images(2, 8)
    program = trace([concatenated(), concatenated()], x)
    merged = merge(program, preserve=2, match=None).program
    assert [layer.number for layer in layers(merged)] == [3, 4]
    assert len(layers(merged)) == 4


@pytest.mark.parametrize("preserve", [-1, 15, 2.5, True, 1e9, None])
def test_a_cut_outside_the_network_is_refused(preserve: object) -> None:
    with pytest.raises(ArgumentError, match="between 0 and 14"):
        _layers("vgg16").number(preserve)  # type: ignore[arg-type]


def test_unknown_modules_and_joins_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"no module that runs; there are avgpool, classifier, features"):
        _layers("vgg16").number("layer2")
    with pytest.raises(ArgumentError, match="no module"):
        _layers("vgg16").number("feat")
    with pytest.raises(ArgumentError, match="'preactivation' or 'activation'"):
        _layers("vgg16").cut(2, "after")  # type: ignore[arg-type]


def test_a_prefix_of_a_name_is_not_the_module() -> None:
    model = nn.Sequential(*[conv(3, 3) if i in (1, 10) else nn.ReLU() for i in range(11)])
    found = layers(model, torch.randn(2, 3, 8, 8))
    assert [found.number(name) for name in ("0", "1", "9", "10")] == [0, 1, 1, 2]


def test_a_module_called_twice_ends_with_its_last_call() -> None:
    found = _layers("twice")
    assert found.number("b") == 3
    assert [node.name for node in found.cut("b").joins] == ["conv2d_2"]


@pytest.mark.parametrize("layer", [nn.Linear(5, 4), nn.Conv1d(3, 4, 2), nn.ConvTranspose1d(3, 4, 2)])
@torch.no_grad()
def test_a_weight_without_one_slice_of_its_outputs_changes_that_channel_alone(layer: nn.Module) -> None:
    x = torch.randn(2, 3, 5)
    program = trace(nn.Sequential(layer), x)
    (node,) = [node for node in program.graph.nodes if node.op == "call_function"]
    weight = program.weights[0]["0.weight"].clone()
    weight.select(output_axis(node), 1).zero_()
    axis = 2 if isinstance(layer, nn.Linear) else 1
    before, after = program(x), program.with_weights([{**program.weights[0], "0.weight": weight}])(x)
    changed = (after != before).movedim(axis, 0).flatten(1).any(1)
    assert changed.tolist() == [False, True, False, False]
    assert torch.equal(after.select(axis, 1), layer.bias[1].expand_as(after.select(axis, 1)))

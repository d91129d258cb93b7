"""Every kind of result is a network like any other: compiled in one graph, traced, hooked, quantised, exported."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import close, edges, images
from micro_models import conv
from torch import Tensor, fx, nn
from torch.ao.nn.quantized.dynamic import Linear as QuantisedLinear
from vfx.passes.fold_normalization import FoldNormalization
from vfx.passes.interpolate import Interpolate

import vfx

X = images(12, 8)
QUIET: dict[str, Any] = {"progress": False, "normalize": None, "solve": None}


def network() -> nn.Module:
    return nn.Sequential(
        conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, 10), nn.LayerNorm(10), nn.GELU(), nn.Linear(10, 4),
    )  # fmt: skip


def pair() -> list[nn.Module]:
    return edges(network, X)


RESULTS: dict[str, Callable[[], vfx.Result]] = {
    "merged": lambda: vfx.merge(pair(), X[:2], **QUIET),
    "solved": lambda: vfx.merge(pair(), X[:2], data=X, solve="least_squares", normalize=None, progress=False),
    "PFM": lambda: vfx.merge(pair(), X[:2], preserve=2, **QUIET),
    "heads": lambda: vfx.merge(pair(), X[:2], heads=1, **QUIET),
    "heads, one tensor": lambda: vfx.merge(pair(), X[:2], heads=2, head_output="cat", **QUIET),
    "masked": lambda: vfx.prune(pair()[0], X[:2], sparsity=0.5, **QUIET),
    "masked, to be trained": lambda: vfx.prune(pair()[0], X[:2], sparsity=0.5, masks="parametrize", **QUIET),
    "fewer channels": lambda: vfx.prune_structured(pair()[0], X[:2], sparsity=0.5, **QUIET),
    "folded channels": lambda: vfx.prune_structured(pair()[0], X[:2], sparsity=0.5, method="fold", **QUIET),
    "folded norms": lambda: vfx.compile(pair(), X[:2], passes=[Interpolate(), FoldNormalization(batch_norm=True)]),
}
GRAPHS = {"PFM", "heads", "heads, one tensor", "folded norms"}  # no class of the user's has them


@pytest.fixture(scope="module", params=RESULTS)
def kind(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    torch.manual_seed(0)
    return request.param, RESULTS[request.param]().module


def outputs(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def same(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    for one, other in zip(outputs(found), outputs(wanted), strict=True):
        close(one, other, tolerance)


def layers(module: nn.Module) -> dict[str, nn.Module]:
    """What holds parameters, but for the parts of a layer that masks make."""
    return {
        path: one
        for path, one in module.named_modules()
        if any(True for _ in one.parameters()) and "parametrizations" not in path
        if type(one) not in (nn.Sequential, nn.Module) and not isinstance(one, fx.GraphModule)
    }


@torch.no_grad()
def test_it_compiles_in_one_graph_at_two_batch_sizes(kind: tuple[str, nn.Module]) -> None:
    name, module = kind
    assert isinstance(module, fx.GraphModule) == (name in GRAPHS)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")  # a graph that breaks is an error
    for x in (X[:5], X):
        same(compiled(x), module(x))


@torch.no_grad()
def test_hooks_fire_on_every_layer_and_traces_give_the_same(kind: tuple[str, nn.Module]) -> None:
    _, module = kind
    watched, fired = layers(module), set[str]()
    assert len(watched) >= 5
    hooks = [one.register_forward_hook(lambda *_, path=path: fired.add(path)) for path, one in watched.items()]
    expected = module(X)
    for hook in hooks:
        hook.remove()
    assert fired == watched.keys()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of TorchScript
        traced = torch.jit.trace(module, X[:3])
        same(traced(X), expected)


@torch.no_grad()
def test_every_linear_layer_is_quantised(kind: tuple[str, nn.Module]) -> None:
    _, module = kind
    permanent = vfx.make_permanent(copy.deepcopy(module))
    linear = {path for path, one in permanent.named_modules() if type(one) is nn.Linear}
    tensors = [x for x in permanent.state_dict().values() if x.ndim == 2]
    assert len(linear) == len(tensors) >= 2  # none of them is loose
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces another package
        small = torch.ao.quantization.quantize_dynamic(permanent, {nn.Linear})
    assert {path for path, one in small.named_modules() if isinstance(one, QuantisedLinear)} == linear
    same(small(X), permanent(X), 0.1)

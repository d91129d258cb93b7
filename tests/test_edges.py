"""Edges as training code hands them over: wrapped, compiled, tied in one alone; what is of no use says so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import vfx
from vfx.errors import ArchitectureError, ArgumentError, WeightError

QUIET: dict[str, Any] = {"match": "weight", "normalize": None, "progress": False}
X = torch.randn(3, 6)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "compiled": lambda m: torch.compile(m, backend="eager"),  # type: ignore[return-value]
    "averaged": torch.optim.swa_utils.AveragedModel,
    "DataParallel of compiled": lambda m: nn.DataParallel(torch.compile(m, backend="eager")),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_taken_off(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    one, other = network(), network()
    wanted = vfx.merge([one, other], X, **QUIET).module
    wrap = WRAPPERS[name]
    for edges in ([wrap(one), wrap(other)], [one, wrap(other)], [wrap(one), other]):
        merged = vfx.merge(edges, X, **QUIET).module
        assert type(merged) is nn.Sequential
        torch.testing.assert_close(merged(X), wanted(X))
    assert vfx.load(vfx.export(wrap(one), tmp_path / "m.safetensors", X)).keys() == one.state_dict().keys()


def _prepared(prepare: Callable[[nn.Module], nn.Module]) -> nn.Module:
    model = network().train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")  # type: ignore[assignment]
    return prepare(model).eval()


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(16), nn.ReLU()), "'0' .* is lazy .* run the model on example inputs"),
    "scripted": (lambda: torch.jit.script(network()), "TorchScript.*give the Python module"),
    "traced": (lambda: torch.jit.trace(network(), X), "TorchScript.*give the Python module"),
    "scripted part": (lambda: nn.Sequential(torch.jit.script(network()), nn.ReLU()), "'0' .* is TorchScript"),
    "quantised": (
        lambda: torch.ao.quantization.quantize_dynamic(network(), {nn.Linear}, dtype=torch.qint8),
        "'0' .* is quantised; work on the floating-point network",
    ),
    "prepared for training": (lambda: _prepared(torch.ao.quantization.prepare_qat), "prepares quantisation; work on"),
    "observed": (lambda: _prepared(torch.ao.quantization.prepare), "prepares quantisation; work on"),
    "quantised part": (
        lambda: nn.Sequential(torch.ao.quantization.quantize_dynamic(network(), {nn.Linear}), nn.ReLU()),
        "'0.0' .* is quantised",
    ),
}


@pytest.mark.filterwarnings("ignore")  # torch's own, of what it deprecates
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_worked_on_says_so(name: str, tmp_path: Path) -> None:
    build, message = REFUSED[name]
    broken = build().eval()
    attempts: list[Callable[[], Any]] = [
        lambda: vfx.merge([broken, broken], X, **QUIET),
        lambda: vfx.merge([network(), broken], X, **QUIET),
        lambda: vfx.repair(network(), [broken], X, data=[X], progress=False),
        lambda: vfx.prune(broken, X, sparsity=0.5, progress=False),
        lambda: vfx.prune_structured(broken, X, sparsity=0.5, progress=False),
        lambda: vfx.diagnose(broken, [network(), network()], X, data=[X], progress=False),
        lambda: vfx.export(broken, tmp_path / "m.pt2", X),
    ]
    for attempt in attempts:
        with pytest.raises(ArgumentError, match=message):
            attempt()
    assert not list(tmp_path.iterdir())


# ties -----------------------------------------------------------------------------------------------------------------


class Words(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table, self.middle = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.gelu(self.middle(self.table(ids))))


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_a_tie_that_one_edge_has_is_loosened(order: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    models, ids = [Words(tied).double().eval() for tied in order], torch.randint(11, (4, 5))
    before = [model.head.weight is model.table.weight for model in models]
    for edge in range(2):
        alone = [float(other == edge) for other in range(2)]
        result = vfx.merge(models, ids, weights=alone, **QUIET)
        torch.testing.assert_close(result.module(ids), models[edge](ids))
        assert type(result.module) is Words
    plain = vfx.merge(models, ids, **QUIET | {"match": None}).module
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(tensor, sum(model.state_dict()[name] for model in models) / 2)
    assert [model.head.weight is model.table.weight for model in models] == before == list(order)
    noted = any("'head.weight' is tied to 'table.weight' in edge 0" in note for note in result.report.notes)
    assert noted == order[0]


def test_ties_of_all_edges_stay() -> None:
    models, ids = [Words(True).eval() for _ in range(2)], torch.randint(11, (4, 5))
    merged = vfx.merge(models, ids, **QUIET).module
    assert merged.head.weight is merged.table.weight


def test_a_module_under_two_names_cannot_be_loosened() -> None:
    class Twice(nn.Module):
        def __init__(self, shared: bool) -> None:
            super().__init__()
            self.one = nn.Linear(6, 6)
            self.two = self.one if shared else nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.relu(self.one(x)))

    with pytest.raises(ArchitectureError, match=r"'two.weight' and 'one.weight' are tied in edge 0 .* not in edge 1"):
        vfx.merge([Twice(True).eval(), Twice(False).eval()], X, **QUIET)


# open sizes -----------------------------------------------------------------------------------------------------------


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.out(self.rnn(x, h)[0][-1])


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))).mean(1)


OPEN: dict[str, tuple[type[nn.Module], Any, tuple[Tensor, ...], tuple[Tensor, ...]]] = {
    "batch on axis 1": (
        TimeFirst,
        ({1: Dim.DYNAMIC}, {1: Dim.DYNAMIC}),
        (torch.randn(5, 2, 4), torch.randn(1, 2, 8)),
        (torch.randn(5, 9, 4), torch.randn(1, 9, 8)),
    ),
    "batch and length": (
        Sequences,
        ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},),
        (torch.randn(2, 5, 4),),
        (torch.randn(9, 7, 4),),
    ),
    "length alone": (Sequences, ({1: Dim.DYNAMIC},), (torch.randn(2, 5, 4),), (torch.randn(2, 7, 4),)),
    "nothing": (Sequences, None, (torch.randn(2, 5, 4),), (torch.randn(2, 5, 4),)),
}


@pytest.mark.parametrize("name", OPEN)
def test_files_leave_open_what_the_capture_left_open(name: str, tmp_path: Path) -> None:
    kind, shapes, example, other = OPEN[name]
    torch.manual_seed(0)
    model = kind().eval()
    result = vfx.merge(vfx.trace([model, model], example, dynamic_shapes=shapes), **QUIET)
    wanted = model(*other).detach()
    torch.testing.assert_close(vfx.load(vfx.export(result, tmp_path / "m.pt2"))(*other), wanted)
    path = vfx.export(result, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {slot.name: x.numpy() for slot, x in zip(session.get_inputs(), other)}
    np.testing.assert_allclose(session.run(None, feeds)[0], wanted.numpy(), rtol=1e-4, atol=1e-5)


META: dict[str, Callable[[nn.Module, Any, Path], Any]] = {
    "merge": lambda model, x, _: vfx.merge([model, model], x, match="weight", normalize=None, progress=False),
    "prune": lambda model, x, _: vfx.prune(model, x, sparsity=0.5, normalize=None, progress=False),
    "prune_structured": lambda model, x, _: vfx.prune_structured(model, x, sparsity=0.5, progress=False),
    "export": lambda model, x, folder: vfx.export(model, folder / "net.pt2", x),
}


@pytest.mark.parametrize("name", META)
@pytest.mark.parametrize("whole", [True, False])
def test_tensors_without_values_are_named(name: str, whole: bool, tmp_path: Path) -> None:
    model, x = network(), X
    if whole:
        model, x = model.to("meta"), X.to("meta")
    else:
        model[0].to("meta")
    with pytest.raises(WeightError, match=r"'0\.weight' .* is on the meta device and has no values; load them before"):
        META[name](model, x, tmp_path)
    assert not list(tmp_path.iterdir())


def test_shapes_are_enough_to_profile() -> None:
    on_meta = vfx.profile(network().to("meta"), X.to("meta"))
    assert (on_meta.params, on_meta.macs) == (vfx.profile(network(), X).params, vfx.profile(network(), X).macs)


@pytest.mark.parametrize("given", [None, [network()], "net"], ids=["nothing", "list", "text"])
def test_what_is_no_network_is_not_exported(given: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="model must be a network or a Result, got"):
        vfx.export(given, tmp_path / "net.pt2", X)
    assert not list(tmp_path.iterdir())

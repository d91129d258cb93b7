"""Masks hold −∞ by right, in buffers, attributes, constants and inputs; parameters and statistics do not."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vfx
from vfx.analyse.verify import verify
from vfx.errors import ArchitectureError, DataError, WeightError

CAUSAL = torch.full((5, 5), float("-inf")).triu(1)
QUIET = {"progress": False}


class Attention(nn.Module):
    def __init__(self, kind: str, mask: Tensor = CAUSAL) -> None:
        super().__init__()
        self.q, self.k, self.v, self.up = (nn.Linear(8, 8) for _ in range(4))
        self.norm, self.down, self.kind = nn.BatchNorm1d(5), nn.Linear(8, 3), kind
        if kind == "buffer":
            self.register_buffer("mask", mask.clone())
        if kind == "frozen":
            self.mask = nn.Parameter(mask.clone(), requires_grad=False)
        if kind == "attribute":
            self.mask = mask.clone()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.kind == "made":
            mask = torch.full((5, 5), float("-inf"), dtype=x.dtype).triu(1)
        elif self.kind != "input":
            mask = self.mask
        h = (self.q(x) @ self.k(x).transpose(1, 2) + mask).softmax(-1) @ self.v(x)
        return self.down(F.relu(self.up(self.norm(h))))


class Heads(nn.Module):
    """A bool mask, of which nn.MultiheadAttention makes one of −∞."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.attention, self.down = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(5, 5).triu(1).bool()
        return self.down(F.relu(self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]))


def built(kind: str, count: int = 2) -> list[nn.Module]:
    torch.manual_seed(0)
    return [(Heads if kind == "bool" else Attention)(kind).double().eval() for _ in range(count)]


def inputs(kind: str, count: int) -> Any:
    x = torch.randn(count, 5, 8, dtype=torch.float64)
    return (x, CAUSAL.double()) if kind == "input" else (x,)


KINDS = ["buffer", "frozen", "attribute", "made", "input", "bool"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_merged_with_itself_is_itself(kind: str) -> None:
    (model,) = built(kind, 1)
    x = inputs(kind, 4)
    for weights in (None, [1.0, 0.0]):
        merged = vfx.merge([model, model], x, match="weight", normalize=None, weights=weights, **QUIET).module
        torch.testing.assert_close(merged(*x), model(*x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_reads_data_or_prunes_takes_them(kind: str) -> None:
    one, other = built(kind)
    x, data = inputs(kind, 4), [inputs(kind, 48)]
    options: list[dict[str, Any]] = [
        {"match": "activation", "solve": None, "normalize": "repair"}, {"solve": "least_squares"}, {"match": "ste"},
        {"match": "weight", "prepare": "lift"},
    ]  # fmt: skip
    for chosen in options:
        assert vfx.merge([one, other], x, data=data, **chosen, **QUIET).module(*x).isfinite().all()
    assert verify(vfx.symmetry(one, x)) < 1e-12
    assert vfx.diagnose(one, [one, other], x, data=data, **QUIET).rows
    assert vfx.prune(one, x, sparsity=0.5, data=data, **QUIET).module(*x).isfinite().all()
    assert vfx.prune_structured(one, x, sparsity=0.5, **QUIET).report.error < 1e-9


@pytest.mark.parametrize("kind", ["buffer", "frozen", "made"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt2", ".onnx"])
def test_files_hold_them(kind: str, suffix: str, tmp_path: Path) -> None:
    model = built(kind, 1)[0].float()
    x = inputs(kind, 4)[0].float()
    path = vfx.export(model, tmp_path / f"m{suffix}", x)
    if suffix == ".safetensors":
        assert vfx.load(path).keys() == model.state_dict().keys()
    if suffix != ".onnx":
        loaded = vfx.load(path, model) if suffix == ".safetensors" else vfx.load(path)
        torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.parametrize("name", ["q.weight", "norm.running_var", "norm.weight"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_parameters_and_statistics_are_finite(name: str, value: float, tmp_path: Path) -> None:
    model = built("buffer", 1)[0].float()
    x = inputs("buffer", 4)[0].float()
    path = vfx.export(model, tmp_path / "m.safetensors", x)
    state = vfx.load(path)
    state[name].view(-1)[0] = value
    broken = Attention("buffer").eval()
    broken.load_state_dict(state)
    torch.save(state, tmp_path / "broken.pt")
    for attempt in (
        lambda: vfx.merge([model, broken], x, match="weight", normalize=None, **QUIET),
        lambda: vfx.trace(broken, x),
        lambda: vfx.load(tmp_path / "broken.pt"),
        lambda: vfx.load(tmp_path / "broken.pt", model),
        lambda: vfx.merge(vfx.trace([model, model], x).with_weights([state, state]), match=None, **QUIET),
    ):
        with pytest.raises(WeightError, match=name):
            attempt()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_frozen_parameter_holds_no_other_infinities(value: float) -> None:
    (model,) = built("frozen", 1)
    vfx.trace(model, inputs("frozen", 4))
    model.mask[0, 0] = value
    with pytest.raises(WeightError, match="mask"):
        vfx.trace(model, inputs("frozen", 4))
    model.mask[0, 0] = 0.0
    model.mask.requires_grad_(True)
    with pytest.raises(WeightError, match="mask"):
        vfx.trace(model, inputs("frozen", 4))


def test_no_mask_holds_nan_and_no_two_are_averaged() -> None:
    x = inputs("buffer", 4)
    one, other = built("buffer")
    other.mask[0, 1] = float("nan")
    with pytest.raises(WeightError, match="mask"):
        vfx.merge([one, other], x, match="weight", normalize=None, **QUIET)
    other.mask[0, 1] = 0.0
    with pytest.raises(ArchitectureError, match=r"'mask' is infinite at other places in edge 1"):
        vfx.merge([one, other], x, match="weight", normalize=None, **QUIET)


def test_data_are_finite_where_the_example_is() -> None:
    models, x = built("made"), inputs("made", 4)
    data = x[0].clone()
    data[0, 0, 0] = float("inf")
    with pytest.raises(DataError, match="NaN or infinite"):
        vfx.merge(models, x, data=[data], **QUIET)
    mask = CAUSAL.double().clone()
    mask[0, 0] = float("nan")
    with pytest.raises(DataError, match="NaN or infinite"):
        vfx.merge(built("input"), inputs("input", 4), data=[(x[0], mask)], **QUIET)

"""What vfx says of bad input: a table of calls that must be refused, each with its error.

    python -m benchmarks.bad_inputs [--output benchmarks/results]

Every call here is made by ``tests/test_bad_inputs.py``, which also holds the committed table against this one.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vfx
from vfx.errors import VfxError

WIDTH = 240  # characters of a message that the table shows
FOREIGN = (
    "Expected one of",
    "Found no",
    "Torch not compiled",
)  # what torch says begins so, and differs with its version
RESULTS = Path(__file__).parent / "results"

X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 3


def _net(width: int = 8, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)).eval()


class _Fixed(nn.Module):
    """A batch of two written into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)).view(2, 5, 8))


class _Branching(nn.Module):
    """Control flow that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) if x.sum() > 0 else -self.first(x)


def _broken(value: float) -> nn.Module:
    model = _net()
    model[0].weight.data[0, 0] = value
    return model


def _merge(models: Any = None, x: Any = X[:2], **options: Any) -> Callable[[], Any]:
    def call() -> Any:
        edges = [_net(), _net(seed=1)] if models is None else models
        return vfx.merge(edges, x, **{"match": "weight", "normalize": None, "progress": False} | options)

    return call


def _prune(model: Any = None, x: Any = X[:2], **options: Any) -> Callable[[], Any]:
    return lambda: vfx.prune(model or _net(), x, **{"sparsity": 0.5, "progress": False} | options)


def _channels(model: Any = None, x: Any = X[:2], **options: Any) -> Callable[[], Any]:
    return lambda: vfx.prune_structured(model or _net(), x, **{"sparsity": 0.5, "progress": False} | options)


def _diagnose(references: Any = None, **options: Any) -> Callable[[], Any]:
    return lambda: vfx.diagnose(_net(), references or [_net()], X[:2], **{"data": X, "progress": False} | options)


def _barrier(**options: Any) -> Callable[[], Any]:
    return lambda: vfx.barrier([_net(), _net(seed=1)], X[:2], **{"data": X, "progress": False} | options)


def _compare(**options: Any) -> Callable[[], Any]:
    return lambda: vfx.compare([_net(), _net(seed=1)], X[:2], **{"data": X, "progress": False} | options)


def _repair(**options: Any) -> Callable[[], Any]:
    return lambda: vfx.repair(_net(), [_net()], X[:2], **{"data": X, "progress": False} | options)


def _compiled(*passes: Any) -> Callable[[], Any]:
    return lambda: vfx.compile([_net(), _net(seed=1)], X[:2], passes=passes)


def _file(name: str, content: bytes) -> Callable[[], Any]:
    def call() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(content)
            return vfx.load(path)

    return call


def _no_file() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return vfx.load(Path(folder) / "absent.pt")


def _export(name: str, *, x: Any = None) -> Callable[[], Any]:
    def call() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            return vfx.export(_net(), Path(folder) / name, x)

    return call


def _nan() -> Tensor:
    return X.clone().fill_(torch.nan)


ALIGN = vfx.Align("activation", X, progress=False)

CASES: Mapping[str, Callable[[], Any]] = {
    # networks
    "merge(network): no list of networks": _merge(models=_net()),
    "merge([one network])": _merge(models=[_net()]),
    "merge([]): an empty list": _merge(models=[]),
    "merge(['a.pt', 'b.pt']): files": _merge(models=["a.pt", "b.pt"]),
    "merge(generator of networks)": lambda: _merge(models=(_net(seed=seed) for seed in range(2)))(),
    "merge: another activation function": _merge(models=[_net(), nn.Sequential(_net()[0], nn.Tanh(), _net()[2])]),
    "merge: a layer more": _merge(models=[_net(), nn.Sequential(*_net(), nn.Linear(3, 3))]),
    "merge: a layer less": _merge(models=[nn.Sequential(*_net(), nn.Linear(3, 3)), _net()]),
    "merge: other widths without matching": _merge(models=[_net(), _net(width=9)], match=None),
    "merge: float32 and float64": lambda: _merge(models=[_net(), _net(seed=1).double()])(),
    "merge: NaN in a weight": lambda: _merge(models=[_net(), _broken(torch.nan)])(),
    "merge: infinity in a weight": lambda: _merge(models=[_broken(torch.inf), _net()])(),
    "prune('resnet18'): a name": lambda: vfx.prune("resnet18", X[:2], sparsity=0.5),  # type: ignore[arg-type]
    "prune_structured: batch written into the code": _channels(model=_Fixed(), x=torch.randn(2, 5, 6)),
    "trace: control flow by values": lambda: vfx.trace(_Branching(), X[:2]),
    # example inputs
    "merge without example_inputs": _merge(x=None),
    "merge: example_inputs=5": _merge(x=5),
    "merge: an empty tuple of example inputs": _merge(x=()),
    "merge: example inputs of another width": _merge(x=torch.randn(2, 5)),
    "merge: too many example inputs": _merge(x=(X[:2], X[:2])),
    "merge: example inputs of an unknown name": _merge(x={"image": X[:2]}),
    # data
    "merge: data=5": _merge(data=5, match="activation"),
    "merge: no data at all": _merge(data=[], match="activation"),
    "merge: data of another width": _merge(data=[torch.randn(8, 5)], match="activation"),
    "merge: data of another dtype": _merge(data=[X.double()], match="activation"),
    "merge: NaN in the data": _merge(data=[_nan()], match="activation"),
    "merge: a batch of a text": _merge(data=["digits"], match="activation"),
    "merge: a batch without the input": _merge(data=[{"image": X}], match="activation"),
    "merge: data for activations missing": _merge(match="activation"),
    "merge: data for REPAIR missing": _merge(normalize="repair"),
    "merge: max_samples=0": _merge(data=X, match="activation", max_samples=0),
    "merge: max_samples=1.5": _merge(data=X, match="activation", max_samples=1.5),
    "compare: a label that is no class": _compare(data=[(X, Y + 1)]),
    "barrier: a label that is no class": _barrier(data=[(X, Y + 1)]),
    "prune: a label that is no class": _prune(score="fisher", data=[(X, Y + 1)]),
    "select: a label that is no class": lambda: vfx.select([(X, Y + 1)], 4, "hard", models=[_net()], progress=False),
    "select: no labels to balance": lambda: vfx.select(X, 4, "balanced"),
    "select: more samples than there are": lambda: vfx.select(X, 100),
    "select: n='all'": lambda: vfx.select(X, "all"),  # type: ignore[arg-type]
    "select: quantiles turned around": lambda: vfx.select(X, 4, models=[_net()], quantiles=(0.8, 0.2)),
    "prune: no minibatch in the data": _prune(score=vfx.WoodFisher(minibatch=64), data=[(X, Y)]),
    # options of merge
    "merge: match=5": _merge(match=5),
    "merge: match='weights'": _merge(match="weights"),
    "merge: classes='all'": _merge(classes="all"),
    "merge: classes=None": _merge(classes=None),
    "merge: restarts=-1": _merge(restarts=-1),
    "merge: restarts for a matcher without": _merge(restarts=2, match="zipit", data=X),
    "merge: seed=-1": _merge(seed=-1),
    "merge: seed='0'": _merge(seed="0"),
    "merge: weights that sum to 1.2": _merge(weights=[0.6, 0.6]),
    "merge: three weights for two edges": _merge(weights=[0.2, 0.3, 0.5]),
    "merge: weights='half'": _merge(weights="half"),
    "merge: alpha of 1.5": _merge(weights=1.5),
    "merge: solve='ridge'": _merge(solve="ridge"),
    "merge: solve=True": _merge(solve=True),
    "merge: judge='accuracy'": _merge(judge="accuracy", data=X, match="activation", solve="auto"),
    "merge: normalize='repare'": _merge(normalize="repare", data=X),
    "merge: preserve=9 of 2 layers": _merge(preserve=9),
    "merge: preserve='features'": _merge(preserve="features"),
    "merge: preserve=1.0": _merge(preserve=1.0),
    "merge: heads=2 of 2 layers": _merge(heads=2),
    "merge: heads of a network with one layer": _merge(models=[nn.Linear(4, 3), nn.Linear(4, 3)], heads=1),
    "merge: heads of a network without layers": _merge(models=[nn.LayerNorm(4), nn.LayerNorm(4)], heads=1),
    "merge: preserve in a network without layers": _merge(models=[nn.LayerNorm(4), nn.LayerNorm(4)], preserve=1),
    "merge: join='middle'": _merge(join="middle", preserve=1),
    "merge: head_output='sum'": _merge(head_output="sum", heads=1),
    "merge: prepare='fold'": _merge(prepare="fold"),
    "merge: budget={'parameters': 2}": _merge(budget={"parameters": 2.0}, data=X),
    "merge: budget={'params': 0.5}": _merge(budget={"params": 0.5}, data=X),
    "merge: budget='small'": _merge(budget="small", data=X),
    "merge: statistics of no kind": _merge(statistics={"0": X}, match="activation"),
    "merge: references=network": _merge(references=_net(), data=X),
    "merge: verify='yes'": _merge(verify="yes"),
    "merge: device='gpu'": _merge(device="gpu"),
    # options of prune
    "prune: sparsity='0.5'": _prune(sparsity="0.5"),
    "prune: sparsity=1.5": _prune(sparsity=1.5),
    "prune: sparsity=-0.1": _prune(sparsity=-0.1),
    "prune: sparsity=NaN": _prune(sparsity=float("nan")),
    "prune without sparsity": _prune(sparsity=None),
    "prune: a glob that matches no layer": _prune(sparsity={"features.*": 0.5}),
    "prune: score='wandb'": _prune(score="wandb"),
    "prune: score without data": _prune(score="wanda"),
    "prune: scope='rows'": _prune(scope="rows"),
    "prune: scope='4:2'": _prune(scope="4:2", sparsity=None),
    "prune: steps=0": _prune(steps=0),
    "prune: steps=2.5": _prune(steps=2.5),
    "prune: schedule='cosine'": _prune(schedule="cosine"),
    "prune: masks='soft'": _prune(masks="soft"),
    "prune: protect=5": _prune(protect=5),
    "prune: repair_samples=0": _prune(repair_samples=0, data=X),
    "prune: structured={'spasity': 0.5}": _prune(scope="group", structured={"spasity": 0.5}),
    "prune_structured: sparsity=1.0": _channels(sparsity=1.0),
    "prune_structured: sparsity and budget": _channels(budget={"flops": 0.5}),
    "prune_structured: neither of them": _channels(sparsity=None),
    "prune_structured: budget={'flops': 0}": _channels(sparsity=None, budget={"flops": 0}),
    "prune_structured: budget={'flops': '50%'}": _channels(sparsity=None, budget={"flops": "50%"}),
    "prune_structured: method='drop'": _channels(method="drop"),
    "prune_structured: score='l3'": _channels(score="l3"),
    "prune_structured: allocation='local'": _channels(allocation="local"),
    "prune_structured: round_to=0": _channels(round_to=0),
    "prune_structured: units='heads'": _channels(units="heads"),
    "prune_structured: protect='0.weight', no list": _channels(protect="0.weight"),
    "prune_structured: protect=['9.weight']": _channels(protect=["9.weight"]),
    "prune_structured: normalize='bias_removal'": _channels(normalize="bias_removal", data=X),
    # other functions
    "repair without references": lambda: vfx.repair(_net(), (), X[:2], data=X),
    "repair: method=None": _repair(method=None),
    "repair: method='bias_removal'": _repair(method="bias_removal"),
    "repair: match='zipit'": _repair(match="zipit"),
    "diagnose without references": lambda: vfx.diagnose(_net(), [], X[:2], data=X),
    "diagnose: match='zip'": _diagnose(match="zip"),
    "barrier: points=2": _barrier(points=2),
    "barrier: points='11'": _barrier(points="11"),
    "barrier: normalize='repair', no list": _barrier(normalize="repair"),
    "compare: a grid of unknown options": _compare(grid={"spasity": [0.5]}),
    "compare: grid=5": _compare(grid=5),
    "collect: within='yes'": lambda: vfx.collect([_net(), _net()], X[:2], data=X, within="yes"),  # type: ignore[arg-type]
    "record: momentum=2": lambda: vfx.record(_net(), momentum=2),
    "record: a network without layers": lambda: vfx.record(nn.ReLU()),
    # passes and methods by their classes
    "compile: a class for a pass": _compiled(vfx.Interpolate),
    "compile: two weight sets left": _compiled(),
    "compile: FoldNormalization behind Align": _compiled(ALIGN, vfx.FoldNormalization(batch_norm=True)),
    "compile: REPAIR without Interpolate": _compiled(vfx.InsertNormalization()),
    "compile: heads kept twice": _compiled(vfx.DuplicateHeads(1), vfx.DuplicateHeads(1)),
    "CalibrateNormalization('repare')": lambda: vfx.CalibrateNormalization("repare", X),  # type: ignore[arg-type]
    "Normalization(count=-1)": lambda: vfx.Normalization("bias_removal", count=-1),
    "Normalization(sweep='fast')": lambda: vfx.Normalization("repair", sweep="fast"),  # type: ignore[arg-type]
    "WoodFisher(minibatch=0)": lambda: vfx.WoodFisher(minibatch=0),
    "StraightThrough(lr='high')": lambda: vfx.StraightThrough(lr="high"),  # type: ignore[arg-type]
    "OptimalTransport(method='emd')": lambda: vfx.OptimalTransport(method="emd"),  # type: ignore[arg-type]
    "Reconstruct without references": lambda: vfx.Reconstruct([], X)(vfx.trace(_net(), X[:2])),
    # files
    "load(None)": lambda: vfx.load(None),  # type: ignore[arg-type]
    "load: no such file": _no_file,
    "load: an unknown suffix": _file("net.h5", b"HDF"),
    "load: an empty .pt": _file("net.pt", b""),
    "load: an empty .safetensors": _file("net.safetensors", b""),
    "load: text in a .onnx": _file("net.onnx", b"not a network"),
    "export: an unknown suffix": _export("net.pkl", x=X[:2]),
    "export: a missing folder": _export("missing/net.onnx", x=X[:2]),
    "export to .onnx without example inputs": _export("net.onnx"),
}


def refusal(call: Callable[[], Any]) -> VfxError:
    """The error that a call ends in. Raises AssertionError where it is accepted, and what is no vfx error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except VfxError as error:
            return error
    raise AssertionError("the call was accepted")


def told(error: VfxError) -> str:
    """The message as the table shows it: one line, no folder of this machine, what torch adds left out."""
    text = re.sub(r"\S*/tmp\w*/", "", " ".join(str(error).split()))
    text = re.sub(r"(with inputs .*?): \w+: .* Way out", r"\1: … Way out", text)
    cut = min((text.index(words) for words in FOREIGN if words in text), default=len(text))
    text = text if cut == len(text) else text[:cut] + "…"
    text = text if len(text) <= WIDTH else text[:WIDTH] + "…"
    return text.replace("|", "\\|")


def table() -> str:
    """The table as Markdown."""
    rows = [(name, refusal(call)) for name, call in CASES.items()]
    lines = [
        "# Bad inputs and what vfx says of them",
        "",
        f"{len(rows)} calls that must be refused, written by `python -m benchmarks.bad_inputs` and held against the "
        "code by `tests/test_bad_inputs.py`.",
        "",
        "| call | error | message |",
        "| --- | --- | --- |",
        *(f"| {name.replace('|', chr(92) + '|')} | {type(error).__name__} | {told(error)} |" for name, error in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    path = parser.parse_args().output / "bad_inputs.md"
    path.write_text(table())
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

"""Networks whose batch cannot vary: the refusal names a way, and the way works with data, files and every function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import close
from torch import Tensor, nn

from vfx.analyse.verify import verify
from vfx.api import compile, layers, merge, profile, prune, prune_structured, symmetry, trace
from vfx.cli import main
from vfx.diagnosis.barrier import barrier
from vfx.diagnosis.diagnose import diagnose
from vfx.emit.files import export, load
from vfx.errors import ArgumentError, CaptureError, DataError
from vfx.statistics.data import Batches

BATCH = 2
X = torch.randn(BATCH, 5, 6, generator=torch.Generator().manual_seed(0))
DATA = [torch.randn(BATCH, 5, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(9)]


class Fixed(nn.Module):
    """A batch of two written into the code."""

    def __init__(self, seed: int = 0, batch: int = BATCH):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last, self.batch = nn.Linear(6, 8), nn.Linear(8, 3), batch

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)).view(self.batch, 5, 8))


class Branching(nn.Module):
    """Control flow that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) if x.sum() > 0 else -self.first(x)


EDGES = [Fixed(0).eval(), Fixed(1).eval()]
OPTIONS: dict[str, Any] = {"progress": False}
CALLS: dict[str, Callable[..., Any]] = {
    "trace": lambda **o: trace(EDGES[0], X, **o),
    "merge": lambda **o: merge(EDGES, X, data=DATA, **OPTIONS, **o),
    "prune": lambda **o: prune(EDGES[0], X, sparsity=0.5, data=DATA, **OPTIONS, **o),
    "prune by group": lambda **o: prune(EDGES[0], X, sparsity=0.5, scope="group", **OPTIONS, **o),
    "prune_structured": lambda **o: prune_structured(EDGES[0], X, sparsity=0.5, data=DATA, **OPTIONS, **o),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_refusal_names_what_the_function_takes(name: str) -> None:
    with pytest.raises(CaptureError, match=r"program = vfx.trace\(model, example_inputs, dynamic_shapes=None\)"):
        CALLS[name]()
    CALLS[name](dynamic_shapes=None)


def test_the_program_goes_in_place_of_the_network_everywhere() -> None:
    program = trace(EDGES, X, dynamic_shapes=None)
    one = program.select(0)
    assert verify(symmetry(one)) < 1e-9
    assert len(layers(one)) == 2
    assert profile(one).params == 6 * 8 + 8 + 8 * 3 + 3
    close(compile(one, passes=[]).module(X), EDGES[0](X), 1e-6)
    whole = merge(program, data=DATA, weights=[1.0, 0.0], solve=None, normalize=None, **OPTIONS)
    close(whole.module(X), EDGES[0](X), 1e-6)
    assert diagnose(whole, program, data=DATA, **OPTIONS).rows
    assert barrier(program, data=DATA, points=3, **OPTIONS).samples == BATCH * len(DATA)
    with pytest.raises(ArgumentError, match="dynamic_shapes= belongs to the capture"):
        merge(program, dynamic_shapes=None)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_it_is_written_as_it_is(tmp_path: Path, suffix: str) -> None:
    result = prune_structured(EDGES[0], X, sparsity=0.5, dynamic_shapes=None, **OPTIONS)
    path = tmp_path / f"net{suffix}"
    with pytest.raises(CaptureError, match="dynamic_shapes=None"):
        export(result.module, path, X)
    assert not path.exists()
    export(result.module, path, X, dynamic_shapes=None)
    if suffix == ".pt2":
        close(load(path)(X), result.module(X), 1e-6)


def test_batches_are_whole() -> None:
    program = trace(EDGES[0], X, dynamic_shapes=None)
    fit, held = Batches(program, DATA).split(4, 100)
    assert [len(batch[0]) for batch in (*fit.batches, *held.batches)] == [BATCH] * len(DATA)
    assert torch.equal(held.batches[0][0], DATA[3])
    assert sum(flag for _, flag in Batches(program, DATA).parts(4)) == 2
    assert [len(batch[0]) for batch in Batches(program, DATA, max_samples=5)] == [BATCH] * 2
    assert len(list(Batches(program, torch.cat(DATA)))) == len(DATA)
    with pytest.raises(DataError, match=r"shape \(3, 5, 6\), the network was captured with \(2, 5, 6\)"):
        prune(program, sparsity=0.5, data=[torch.randn(3, 5, 6)], **OPTIONS)
    free = trace(nn.Linear(6, 3), X)
    assert [len(batch[0]) for batch in Batches(free, DATA, max_samples=3)] == [2, 1]


def test_a_batch_of_one_stays_one() -> None:
    network = Fixed(batch=1).eval()
    program = trace(network, X[:1], dynamic_shapes=None)
    close(program(X[:1]), network(X[:1]), 1e-6)


def test_branches_on_values_are_called_so_and_torchs_graph_is_kept_back(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError, match="where shapes or branches depend on values") as refused:
        trace(Branching(), torch.randn(2, 4))
    assert "vfx.trace" not in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    written = capfd.readouterr()
    assert written.out == written.err == ""
    assert "torch.ops.aten.gt.Scalar" in refused.value.details


def test_the_command_line_shows_torchs_graph_with_debug_alone(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    line = ["vfx", "profile", "-m", "test_fixed_batch:Branching", "-i", "4"]
    shown = []
    for extra in ([], ["--debug"]):
        monkeypatch.setattr("sys.argv", [*line, *extra])
        with pytest.raises(SystemExit):
            main()
        shown.append(capfd.readouterr().err)
    assert shown[0].startswith("CaptureError: torch.export could not capture Branching")
    assert "Traceback" not in shown[0]
    assert "torch.ops.aten" not in shown[0]
    assert "torch.ops.aten.gt.Scalar" in shown[1]
    assert "Traceback" in shown[1]

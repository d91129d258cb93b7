"""What reads data: endless generators, iterators, limits that cut a batch, samples on another axis; several threads."""

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import vfx
from vfx.statistics.data import Batches, Replay

QUIET = {"progress": False}
LIMIT, SIZE = 64, 24  # the limit cuts the third batch


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double().eval()


def endless(most: int = LIMIT, labels: bool = False) -> Iterator[Any]:
    """Batches without an end; whoever reads beyond ``most`` samples fails."""
    generator, read = torch.Generator().manual_seed(0), 0
    while True:
        assert read < most, f"{read + SIZE} samples were read for a limit of {most}"
        read += SIZE
        x = torch.randn(SIZE, 4, generator=generator, dtype=torch.float64)
        yield (x, torch.arange(SIZE) % 2) if labels else x


def pair() -> list[nn.Module]:
    torch.manual_seed(0)
    return [network(), network()]


X = torch.randn(2, 4, dtype=torch.float64)
READERS: dict[str, Callable[..., Any]] = {
    "merge": lambda m, **o: vfx.merge(m, X, **o),
    "merge by activations": lambda m, **o: vfx.merge(m, X, match="activation", solve=None, normalize="repair", **o),
    "merge by ste": lambda m, **o: vfx.merge(m, X, match="ste", solve=None, normalize=None, **o),
    "merge by zipit": lambda m, **o: vfx.merge(m, X, match="zipit", solve=None, normalize=None, **o),
    "merge by least squares": lambda m, **o: vfx.merge(m, X, solve="least_squares", **o),
    "merge with a budget": lambda m, **o: vfx.merge(m, X, budget={"params": 1.5}, **o),
    "references": lambda m, **o: vfx.merge(m, X, references=m, normalize="repair", solve=None, **o),
    "repair": lambda m, **o: vfx.repair(m[0], m[1:], X, match="activation", **o),
    "repair by ste": lambda m, **o: vfx.repair(m[0], m[1:], X, match="ste", solve=None, method="repair", **o),
    "collect": lambda m, **o: vfx.collect(m, X, **o),
    "diagnose": lambda m, **o: vfx.diagnose(m[0], m, X, match="activation", **o),
    "diagnose by ste": lambda m, **o: vfx.diagnose(m[0], m, X, match="ste", **o),
    "barrier": lambda m, **o: vfx.barrier(m, X, points=3, **o),
    "barrier by ste": lambda m, **o: vfx.barrier(m, X, match="ste", points=3, normalize=[None], **o),
    "compare": lambda m, **o: vfx.compare(m, X, grid={"solve": [None, "least_squares"]}, **o),
    "prune": lambda m, **o: vfx.prune(m[0], X, sparsity=0.5, score="wanda", **o),
    "prune by gradients": lambda m, **o: vfx.prune(m[0], X, sparsity=0.5, score="fisher", protect=(), **o),
    "prune channels": lambda m, **o: vfx.prune_structured(m[0], X, sparsity=0.5, score="activation", **o),
    "prune channels by gradients": lambda m, **o: vfx.prune_structured(m[0], X, sparsity=0.5, score="taylor", **o),
}


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("name", READERS)
def test_a_limit_ends_the_reading_of_an_endless_generator(name: str, labels: bool) -> None:
    READERS[name](pair(), data=endless(labels=labels), max_samples=LIMIT, **QUIET)


def test_an_endless_generator_gives_what_a_list_gives() -> None:
    batches = list(itertools.islice(endless(), 3))
    results = [
        vfx.merge(pair(), X, data=data, max_samples=LIMIT, solve="least_squares", **QUIET).program.weights[0]
        for data in (endless(), batches, [torch.cat(batches)[:LIMIT]])
    ]
    for other in results[1:2]:
        assert all(torch.equal(results[0][name], tensor) for name, tensor in other.items())
    for name, tensor in results[2].items():
        torch.testing.assert_close(results[0][name], tensor)
    whole = vfx.merge(pair(), X, data=batches, solve="least_squares", **QUIET).program.weights[0]
    assert any((results[0][name] - tensor).abs().max() > 1e-6 for name, tensor in whole.items())


def test_a_replay_reads_as_far_as_it_is_asked() -> None:
    source = iter(range(10))
    replay = Replay(source)
    assert list(itertools.islice(replay, 3)) == [0, 1, 2]
    assert next(source) == 3
    assert list(Replay(iter("abc"))) == ["a", "b", "c"]
    twice = Replay(iter("abc"))
    assert list(twice) == list(twice) == ["a", "b", "c"]


class TimeFirst(nn.Module):
    """The batch stands on axis 1 of both inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.up, self.out = nn.GRU(4, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.out(torch.relu(self.up(self.rnn(x, h)[0][-1])))


def time_first(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(5, batch, 4, dtype=torch.float64), torch.randn(1, batch, 8, dtype=torch.float64)


def captured(count: int) -> vfx.Program:
    torch.manual_seed(0)
    models = [TimeFirst().double().eval() for _ in range(count)]
    return vfx.trace(models if count > 1 else models[0], time_first(2), dynamic_shapes=({1: Dim.DYNAMIC},) * 2)


def test_samples_stand_where_the_capture_leaves_a_size_open() -> None:
    program = captured(1)
    assert program.batch_axes == (1, 1)
    batches = Batches(program, [time_first(7), time_first(6)], max_samples=10)
    assert [[tuple(x.shape) for x in batch] for batch in batches] == [
        [(5, 7, 4), (1, 7, 8)],
        [(5, 3, 4), (1, 3, 8)],
    ]
    plain = vfx.trace(network(), X)
    assert plain.batch_axes == (0,)


def test_networks_with_the_batch_on_another_axis_are_merged_and_pruned_on_data() -> None:
    x, program = time_first(9), captured(2)
    data = [time_first(40), time_first(40)]
    for options in ({"match": "activation", "normalize": "repair", "solve": None}, {"solve": "least_squares"}, {}):
        merged = vfx.merge(program, data=data, max_samples=60, **options, **QUIET).module
        assert merged(*x).shape == (9, 3)
    small = vfx.prune_structured(captured(1), sparsity=0.5, data=data, max_samples=60, **QUIET)
    assert small.report.error < 1e-9
    assert small.module(*x).shape == (9, 3)
    assert vfx.prune(captured(1), sparsity=0.5, score="wanda", data=data, **QUIET).module(*x).shape == (9, 3)
    assert vfx.diagnose(program.select(0), program, data=data, max_samples=60, match=None, **QUIET).samples == 60


def test_threads_do_not_meet(tmp_path: Path) -> None:
    errors: list[Exception] = []
    start = threading.Barrier(4)

    def work(number: int) -> None:
        try:
            start.wait()
            result = vfx.merge(pair(), X, match="weight", normalize=None, **QUIET)
            path = vfx.export(result, tmp_path / f"{number}{'.onnx' if number % 2 else '.pt2'}")
            if not number % 2:
                torch.testing.assert_close(vfx.load(path)(X), result.module(X))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors

"""What matching costs, in process time of one process.

- ZipIt!'s greedy matching against the cubic search of its definition. Features are ReLU units of random inputs that
  share a common cause, so that correlations are spread as in a network. The literal search (masked maximum over the
  whole table before each merge, as vectorised as it goes) is run up to 512 channels; from there on only the product's.
- Weight matching of two MLPs of 64 channels by their depth, milliseconds a layer: linear in depth if they stay.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import chain, product
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from torch import nn

from benchmarks.fashion import RESULTS
from benchmarks.options import Output
from vfx.api import symmetry, trace
from vfx.files import write_atomic
from vfx.match.matcher import Problem
from vfx.match.weight import WeightMatching
from vfx.match.zipit import Similarity, merges

A, B, SAMPLES, LITERAL_UP_TO = 0.3, 0.125, 400, 512
WIDTH, CLASSES, ROUNDS = 64, ("permutation", "full"), 12


def features(total: int, seed: int) -> Similarity:
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((total, SAMPLES))
    values += generator.random((total, 1)) * generator.standard_normal((1, SAMPLES))
    found = np.corrcoef(np.maximum(values, 0))
    return (found + found.T) / 2


def literal(similarity: Similarity, edges: int) -> list[tuple[int, int]]:
    """The whole table is searched, and cut, before each merge."""
    size, table = len(similarity) // edges, similarity.copy()
    names, owner = np.arange(len(similarity)), np.repeat(np.arange(edges), size)
    budget = np.full(edges, int((edges - 1) * size / edges * B + 1e-9))
    np.fill_diagonal(table, -np.inf)
    found = []
    while len(names) > size:
        spent = (owner >= 0) & (budget[owner] <= 0)
        allowed = np.where(spent[:, None] & (owner[:, None] == owner), -np.inf, table)
        r, c = sorted(divmod(int(allowed.argmax()), len(names)))
        found.append((int(names[r]), int(names[c])))
        if owner[r] == owner[c] >= 0:
            budget[owner[r]] -= 1
        else:
            owner[r] = -1
        row = A * np.minimum(table[r], table[c])
        row[r] = -np.inf
        table[r, :] = table[:, r] = row
        keep = np.arange(len(names)) != c
        table, names, owner = table[keep][:, keep], names[keep], owner[keep]
    return found


def greedy(channels: list[int]) -> Iterator[str]:
    """ZipIt!'s matching, a line for each number of channels."""
    yield from ("| channels | definition, s | vfx, s | ratio |", "| --- | --- | --- | --- |")
    for size in channels:
        similarity = features(2 * size, size)
        start = time.process_time()
        found = merges(similarity, 2, A, B)
        ours = time.process_time() - start
        cells = ["", f"{ours:.3f}", ""]
        if size <= LITERAL_UP_TO:
            start = time.process_time()
            assert literal(similarity, 2) == found, "the merges differ"
            theirs = time.process_time() - start
            cells = [f"{theirs:.3f}", f"{ours:.3f}", f"{theirs / ours:.0f}"]
        yield f"| {size} | " + " | ".join(cells) + " |"


def mlp(depth: int) -> nn.Module:
    hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 10)).eval()


def by_depth(depths: list[int]) -> Iterator[str]:
    """Weight matching, a line for each number of layers: the least of a few rounds, and how many sweeps there were."""
    yield from (
        "| layers | " + " | ".join(f"{name}, ms a layer | sweeps" for name in CLASSES) + " |",
        "| --- " * 5 + "|",
    )
    problems, times, sweeps = {}, dict[tuple[int, str], list[float]](), {}
    for depth in depths:
        torch.manual_seed(0)
        program = trace([mlp(depth) for _ in range(2)], torch.randn(2, WIDTH))
        problems[depth] = Problem(program, symmetry(program))
    for _ in range(ROUNDS):  # in turns, so that a busy machine slows all of them alike
        for depth, name in product(depths, CLASSES):
            start = time.process_time()
            sweeps[depth, name] = WeightMatching(classes=name)(problems[depth]).sweeps[0]
            times.setdefault((depth, name), []).append(1000 * (time.process_time() - start) / depth)
    for depth in depths:
        cells = [f"{min(times[depth, name]):.2f} | {sweeps[depth, name]}" for name in CLASSES]
        yield f"| {depth} | " + " | ".join(cells) + " |"


def main(
    channels: Annotated[list[int] | None, typer.Option(help="Channels of a network (may be repeated).")] = None,
    depth: Annotated[list[int] | None, typer.Option(help="Layers of an MLP (may be repeated).")] = None,
    output: Output = RESULTS,
) -> None:
    """Time both and write matching_speed.md."""
    torch.set_num_threads(1)
    lines = ["# What matching costs", "", (__doc__ or "").split("\n\n", 1)[1], ""]
    for line in chain(greedy(channels or [64, 128, 256, 512, 1024, 2048]), [""], by_depth(depth or [25, 50, 100])):
        lines.append(line)
        Console(stderr=True).print(line)
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / "matching_speed.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    typer.run(main)

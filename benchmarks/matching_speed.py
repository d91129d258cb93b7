"""ZipIt!'s greedy matching against the cubic search of its definition: process time of both, in one process.

Features are ReLU units of random inputs that share a common cause, so that correlations are spread as in a network.
The literal search (masked maximum over the whole table before each merge, as vectorised as it goes) is run up to 512
channels; from there on only the product's.
"""

from __future__ import annotations

import time
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from benchmarks.fashion import RESULTS
from benchmarks.options import Output
from vfx.files import write_atomic
from vfx.match.zipit import Similarity, merges

A, B, SAMPLES, LITERAL_UP_TO = 0.3, 0.125, 400, 512


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


def main(
    channels: Annotated[list[int] | None, typer.Option(help="Channels of a network (may be repeated).")] = None,
    output: Output = RESULTS,
) -> None:
    """Time the greedy matching of two networks and write matching_speed.md."""
    rows = ["| channels | definition, s | vfx, s | ratio |", "| --- | --- | --- | --- |"]
    for size in channels or (64, 128, 256, 512, 1024, 2048):
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
        rows.append(f"| {size} | " + " | ".join(cells) + " |")
        Console(stderr=True).print(rows[-1])
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / "matching_speed.md", "\n".join(rows) + "\n")


if __name__ == "__main__":
    typer.run(main)

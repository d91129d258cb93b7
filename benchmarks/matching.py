"""Seconds and memory of the matching methods on two torchvision networks with random weights, one fresh process each.

Seconds are processor time of the matching alone, on one thread. Memory is the largest resident size of the process
beyond what it held before (Python, PyTorch, both networks, trace and symmetry), in units of one network's weights. The
share of linear assignments in the time, and the same assignments from a pool of threads, tell whether threads help.
Results go to ``benchmarks/results``: matching.json, matching.md.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import numpy as np
import torch
import torchvision
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.fashion import RESULTS
from benchmarks.options import Output
from benchmarks.pairs_report import grid
from vfx.api import symmetry, trace
from vfx.files import write_atomic
from vfx.match.c2m3 import C2M3
from vfx.match.matcher import Problem, assign
from vfx.match.weight import WeightMatching

MATCHERS: dict[str, Callable[[], Any]] = {
    "weight": WeightMatching,
    "weight, permutations": lambda: WeightMatching(classes="permutation"),
    "c2m3, 10 steps": lambda: C2M3(iterations=10),
}
TARGETS = {("resnet50", "weight"): (60.0, 4.0), ("resnet50", "weight, permutations"): (60.0, 4.0)}
MARK = "result: "
console = Console(stderr=True)


def peak() -> int:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(network: str, method: str) -> dict[str, Any]:
    """Match two networks in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = [getattr(torchvision.models, network)().eval() for _ in range(2)]
    program = trace(models, torch.randn(2, 3, 64, 64))
    facts = symmetry(program)
    size = sum(t.numel() * t.element_size() for t in program.weights[0].values())
    before, start, wall = peak(), time.process_time(), time.perf_counter()
    found = MATCHERS[method]()(Problem(program, facts))
    return {
        "network": network,
        "method": method,
        "model_megabytes": round(size / 1e6, 1),
        "seconds": round(time.process_time() - start, 2),
        "wall_seconds": round(time.perf_counter() - wall, 2),
        "peak_ratio": round((peak() - before) / size, 2),
        "sweeps": list(found.sweeps),
        "groups": len(facts.groups),
    }


def assignments(network: str) -> dict[str, Any]:
    """Wall time of one assignment for every group, in a row and from two threads; the best of three."""
    torch.set_num_threads(1)
    program = trace(getattr(torchvision.models, network)().eval(), torch.randn(2, 3, 64, 64))
    rng = np.random.default_rng(0)
    gains = [rng.standard_normal((group.size, group.size)) for group in symmetry(program).groups]
    times: dict[str, list[float]] = {"serial": [], "threads": []}
    for _ in range(3):
        start = time.perf_counter()
        for gain in gains:
            assign(gain)
        times["serial"].append(time.perf_counter() - start)
        start = time.perf_counter()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(assign, gains))
        times["threads"].append(time.perf_counter() - start)
    return {"network": network, **{f"{name}_seconds": round(min(own), 3) for name, own in times.items()}}


def fresh(*arguments: str) -> dict[str, Any]:
    """The result of one measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.matching", *(f"--{a}" for a in arguments)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(next(line for line in output.splitlines() if line.startswith(MARK)).removeprefix(MARK))


def markdown(result: dict[str, Any]) -> str:
    rows = []
    for row in result["matchings"]:
        seconds, ratio = TARGETS.get((row["network"], row["method"]), (None, None))
        rows.append(
            [
                row["network"],
                row["method"],
                f"{row['seconds']:.1f}" + (f" (≤ {seconds:g})" if seconds else ""),
                f"{row['peak_ratio']:.2f}" + (f" (≤ {ratio:g})" if ratio else ""),
                f"{row['model_megabytes']:.0f} MB",
                str(row["groups"]),
                ", ".join(map(str, row["sweeps"])),
            ]
        )
    head = ["network", "method", "processor seconds", "peak / model", "model", "groups", "sweeps"]
    lines = ["# Matching: time and memory", "", (__doc__ or "").strip(), "", *grid(head, rows), ""]
    for row in result["assignments"]:
        lines.append(
            f"One assignment for each group of {row['network']} on random gains: {row['serial_seconds']:.2f} s in a "
            f"row, {row['threads_seconds']:.2f} s from two threads."
        )
    return "\n".join([*lines, ""])


def main(
    output: Output = RESULTS,
    network: Annotated[list[str] | None, typer.Option(help="torchvision networks (may be repeated).")] = None,
    method: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(MATCHERS)} (may be repeated).")] = None,
    one: Annotated[str, typer.Option(help="Only this network=method, in this process.", hidden=True)] = "",
    lap: Annotated[str, typer.Option(help="Only this network's assignments, in this process.", hidden=True)] = "",
) -> None:
    """Match two networks with every method and write seconds and memory."""
    if one or lap:
        print(MARK + json.dumps(assignments(lap) if lap else measure(*one.split("=", 1))))
        return
    names = network or ["resnet18", "resnet50"]
    methods = method or list(MATCHERS)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    result: dict[str, Any] = {"matchings": [], "assignments": []}
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("matching", total=len(names) * (len(methods) + 1))
        for name in names:
            for one_method in methods:
                result["matchings"].append(fresh(f"one={name}={one_method}"))
                progress.advance(task)
            result["assignments"].append(fresh(f"lap={name}"))
            progress.advance(task)
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / "matching.json", json.dumps(result, indent=1) + "\n")
    write_atomic(output / "matching.md", markdown(result))
    console.print(f"wrote {output / 'matching.json'} and matching.md")


if __name__ == "__main__":
    typer.run(main)

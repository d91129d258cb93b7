"""Peak memory and processor time of calls on ResNet50 and GPT-2 small, each in a process of its own.

Weights are random, as memory does not depend on them. A model is what its parameters and buffers take. ``peak`` is the
resident memory above what the process held with its inputs (the networks) in place, ``kept`` what is left of it while
the Result is held; both in models. Before, the same call runs on a tiny network of the kind, so that modules that load
on first use do not count. ResNet50 sees one image of 64 × 64, GPT-2 (transformers) 16 tokens. Times are those of the
process, all threads together; wall time depends on what else the machine does (``load``, of the last minute). Where a
peak is in bold it is above its target.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from benchmarks.fashion import RESULTS
from benchmarks.memory import current_memory, peak_memory, reset_peak_memory
from benchmarks.options import Output
from vfx.api import merge, prune, prune_structured
from vfx.files import write_atomic

Call = Callable[[list[nn.Module], Tensor], Any]
QUIET: dict[str, Any] = {"progress": False}
HEAD = (
    "| network | call | peak, models | target | kept, models | processor, s | wall, s | load |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
)


def _resnet50(tiny: bool) -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    layers, width = ([1, 1, 1, 1], 8) if tiny else ([3, 4, 6, 3], 64)
    return ResNet(Bottleneck, layers, width_per_group=width)


def _gpt2_small(tiny: bool) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2} if tiny else {}
    return GPT2LMHeadModel(GPT2Config(use_cache=False, **sizes))


NETWORKS: dict[str, tuple[Callable[[bool], nn.Module], Callable[[], Tensor]]] = {
    "ResNet50": (_resnet50, lambda: torch.randn(1, 3, 64, 64)),
    "GPT-2 small": (_gpt2_small, lambda: torch.randint(64, (1, 16))),
}


def _merged(classes: str) -> Call:
    return lambda models, x: merge(models, x, match="weight", classes=classes, **QUIET)


# the call, how many networks it takes, the most models to peak at, and whether the largest layer comes on top
CALLS: dict[str, tuple[Call, int, float, bool]] = {
    "prune, magnitude": (lambda m, x: prune(m[0], x, sparsity=0.5, **QUIET), 1, 1.5, False),
    "prune_structured": (lambda m, x: prune_structured(m[0], x, sparsity=0.5, **QUIET), 1, 1.5, False),
    "merge, permutations": (_merged("permutation"), 2, 2.0, True),
    "merge, full classes": (_merged("full"), 2, 3.0, False),
}


def measure(network: str, call: str) -> dict[str, Any]:
    """One call in this process."""
    build, inputs = NETWORKS[network]
    run, count, most, and_layer = CALLS[call]
    run([build(True) for _ in range(count)], inputs())
    torch.manual_seed(0)
    models, x = [build(False) for _ in range(count)], inputs()
    held = {**dict(models[0].named_parameters()), **dict(models[0].named_buffers())}
    sizes = [tensor.nbytes / 2**20 for tensor in held.values()]
    model = sum(sizes)
    _settle()
    reset_peak_memory()
    before, started, clock = current_memory(), time.perf_counter(), time.process_time()
    result = run(models, x)
    wall, processor, peak = time.perf_counter() - started, time.process_time() - clock, peak_memory()
    _settle()
    kept = current_memory()
    return {
        "network": network,
        "call": call,
        "model_mib": round(model),
        "peak": round((peak - before) / model, 2),
        "target": round(most + and_layer * max(sizes) / model, 2),
        "kept": round((kept - before) / model, 2),
        "wall_s": round(wall, 1),
        "processor_s": round(processor, 1),
        "load": round(os.getloadavg()[0], 1),
        "class": type(result.module).__name__,
        "stages": {name: round(float(took), 2) for name, took in result.report.seconds.items()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
    }


def _settle() -> None:
    """Give back what is free, so that what is resident is what is held."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def main(
    network: Annotated[list[str] | None, typer.Option(help="Only these networks (may be repeated).")] = None,
    call: Annotated[list[str] | None, typer.Option(help="Only these calls (may be repeated).")] = None,
    output: Output = RESULTS,
    alone: Annotated[bool, typer.Option("--alone", help="Measure the one named here, in this process.")] = False,
) -> None:
    """Measure each call in a process of its own, and write peaks.json and peaks.md after each."""
    chosen = [(n, c) for n in network or NETWORKS for c in call or CALLS]
    if alone:
        (one,) = chosen
        print(json.dumps(measure(*one)))
        return
    path = output / "peaks.json"
    rows = json.loads(path.read_text()) if path.is_file() else {}
    for one in chosen:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peaks", "--alone", "--network", one[0]]
        done = subprocess.run([*command, "--call", one[1]], stdout=subprocess.PIPE, check=True, text=True)
        rows[", ".join(one)] = json.loads(done.stdout.splitlines()[-1])
        Console(stderr=True).print(rows[", ".join(one)])
        output.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(rows, indent=1) + "\n")
        write_atomic(output / "peaks.md", page(rows))


def page(rows: dict[str, dict[str, Any]]) -> str:
    """The table, misses in bold."""
    text = [f"{(__doc__ or '').strip()}", "", "Command: `OMP_NUM_THREADS=1 python -m benchmarks.peaks`.", "", *HEAD]
    for row in rows.values():
        peak = f"{row['peak']:.2f}" if row["peak"] <= row["target"] else f"**{row['peak']:.2f}**"
        cells = [row["network"], row["call"], peak, f"{row['target']:.2f}", f"{row['kept']:.2f}"]
        cells += [f"{row['processor_s']:.1f}", f"{row['wall_s']:.1f}", f"{row['load']:.1f}"]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    typer.run(main)

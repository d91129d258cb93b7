"""Speed of a structurally pruned network, in one process with the whole one.

- forward: ResNet50 against itself without half the channels of each group, the median ratio of interleaved rounds on
  the same images (target: at least 1.8 times as fast);
- prune: ``trace`` and ``RemoveChannels`` with its proof, and emission, in seconds (target: at most 15).

Weights are random. Results go to ``benchmarks/results/pruning_speed.json``.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Annotated, Any

import torch
import torchvision
import typer
from rich.console import Console
from torch import Tensor, nn

from benchmarks.fashion import RESULTS
from benchmarks.options import Device, Output
from vfx.api import prune_structured
from vfx.files import write_atomic

FASTER, SECONDS = 1.8, 15.0
console = Console()


@torch.no_grad()
def forward_seconds(module: nn.Module, x: Tensor) -> float:
    start = time.perf_counter()
    module(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(batch: int, side: int, rounds: int, sparsity: float, device: str) -> dict[str, Any]:
    """Ratio of forward passes, and the seconds from model to smaller module."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50().eval().to(device)
    x = torch.randn(batch, 3, side, side, device=device)
    start, busy = time.perf_counter(), time.process_time()
    result = prune_structured(model, x[:2], sparsity=sparsity, round_to=8, progress=False)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    small = result.module.to(device)
    for module in (model, small):
        forward_seconds(module, x)
    pairs = [(forward_seconds(model, x), forward_seconds(small, x)) for _ in range(rounds)]
    return {
        "faster": round(statistics.median(whole / cut for whole, cut in pairs), 3),
        "forward_seconds": [round(statistics.median(column), 4) for column in zip(*pairs)],
        "prune_seconds": round(seconds, 2),
        "prune_processor_seconds": round(busy, 2),
        "stages": {stage: round(value, 2) for stage, value in result.report.seconds.items()},
        "params_ratio": round(result.report.params_ratio, 4),
        "flops_ratio": round(result.report.flops_ratio, 4),
        "verify_error": result.report.error,
        "batch": batch,
        "side": side,
        "sparsity": sparsity,
        "device": device,
        "threads": torch.get_num_threads(),
    }


def main(
    batch: Annotated[int, typer.Option(help="Images of a forward pass.")] = 8,
    side: Annotated[int, typer.Option(help="Side of the images.")] = 224,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 7,
    sparsity: Annotated[float, typer.Option(help="Share of each group's channels that goes.")] = 0.5,
    device: Device = "cpu",
    output: Output = RESULTS,
) -> None:
    """Measure ResNet50 before and after the removal of half its channels."""
    found = measure(batch, side, rounds, sparsity, device)
    faster, seconds = found["faster"], found["prune_seconds"]
    console.print(f"forward {faster:.2f}× as fast ({'ok' if faster >= FASTER else 'missed'}, target {FASTER}×)")
    console.print(f"prune {seconds:.1f} s ({'ok' if seconds <= SECONDS else 'missed'}, target {SECONDS:.0f} s)")
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / "pruning_speed.json", json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)

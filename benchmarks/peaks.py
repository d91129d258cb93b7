"""Peak memory and processor time of calls on ResNet50 and GPT-2 small, each in a process of its own.

Weights are random, as neither memory nor the work of one sweep depends on them. A model is what its parameters and
buffers take. ``peak`` is the resident memory above what the process held with its inputs (the networks) in place,
``kept`` what is left of it while the Result is held; both in models. Before, the same call runs on a tiny network of
the kind, so that modules that load on first use do not count. Times are of the process, all threads together, behind
the same warm-up.
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

Call = Callable[[list[nn.Module], Tensor, bool], Any]
QUIET: dict[str, Any] = {"progress": False}


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
    return lambda models, x, verify: merge(models, x, match="weight", classes=classes, verify=verify, **QUIET)


CALLS: dict[str, tuple[Call, int, float]] = {  # the call, how many networks it takes, and the most models to peak at
    "prune, magnitude": (lambda m, x, verify: prune(m[0], x, sparsity=0.5, verify=verify, **QUIET), 1, 1.5),
    "prune_structured": (lambda m, x, verify: prune_structured(m[0], x, sparsity=0.5, verify=verify, **QUIET), 1, 1.5),
    "merge, permutations": (_merged("permutation"), 2, 2.0),
    "merge, full classes": (_merged("full"), 2, 3.0),
}


def measure(network: str, call: str, verify: bool) -> dict[str, Any]:
    """One call in this process."""
    build, inputs = NETWORKS[network]
    run, count, most = CALLS[call]
    run([build(True) for _ in range(count)], inputs(), verify)
    torch.manual_seed(0)
    models, x = [build(False) for _ in range(count)], inputs()
    sizes = [
        tensor.nbytes / 2**20
        for tensor in {**dict(models[0].named_parameters()), **dict(models[0].named_buffers())}.values()
    ]
    model = sum(sizes)
    _settle()
    reset_peak_memory()
    before, started, clock = current_memory(), time.perf_counter(), time.process_time()
    result = run(models, x, verify)
    wall, processor, peak = time.perf_counter() - started, time.process_time() - clock, peak_memory()
    _settle()
    kept = current_memory()
    allowed = most + (max(sizes) / model if "merge" in call and "full" not in call else 0)
    return {
        "network": network, "call": call, "verify": verify, "model_mib": round(model),
        "peak": round((peak - before) / model, 2), "target": round(allowed, 2), "kept": round((kept - before) / model, 2),
        "wall_s": round(wall, 1), "processor_s": round(processor, 1), "class": type(result.module).__name__,
        "stages": {name: round(float(took), 2) for name, took in result.report.seconds.items()},
    }  # fmt: skip


def _settle() -> None:
    """Give back what is free, so that what is resident is what is held."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


if __name__ == "__main__":
    import os

    found = measure(sys.argv[1], sys.argv[2], sys.argv[3:] != ["--no-verify"])
    print(json.dumps(found | {"load": os.getloadavg()[0]}))

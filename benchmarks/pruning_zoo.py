"""Structured pruning of public networks: does each come out smaller and right?

Of the papers' networks, of every classification, segmentation and video network of torchvision, and of the timm and
Hugging Face networks of ``benchmarks.zoo``, 25, 50 and 75 % of each symmetry group's channels (whole heads and their
insides too) are removed by magnitude, with random weights, norms and statistics. The smaller network must equal the
masked one in float64 to 1e-6: removed features are exactly zero at full size, and norms and reductions over channels
run over those that are kept. It must run at batch sizes 1 and 5 as a module; with ``--onnx`` it is also exported at 50
% and compared in ONNX Runtime. Networks of more than 150 million parameters are left out unless ``--large``. Each runs
in a process of its own.

Results go to ``benchmarks/results``: pruning_zoo.json and pruning_zoo.md, written after each network.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from vfx.passes.remove_channels import RemoveChannels

from benchmarks.fashion import RESULTS
from benchmarks.options import Fresh, Output
from benchmarks.pairs_report import grid
from benchmarks.zoo import SOURCES, Network, networks
from vfx.analyse.cost import cost
from vfx.analyse.symmetry import symmetry
from vfx.analyse.verify import randomise
from vfx.api import trace
from vfx.capture.outputs import named_tensors
from vfx.emit.files import export
from vfx.emit.module import graph_module
from vfx.files import write_atomic
from vfx.program import Program
from vfx.proof import in_double

EXACT = 1e-6
SPARSITIES = (0.25, 0.5, 0.75)
LARGE = 150_000_000  # parameters
console = Console(stderr=True)


def measure(network: Network, onnx: bool, threads: int, limit: int) -> dict[str, Any]:
    """One network's line; runs in its own process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = network.build()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters > limit:
        return {"skipped": f"{parameters:,} parameters"}
    program = in_double(trace(model, network.inputs()))
    weights = randomise(program, list(program.example_inputs), torch.Generator().manual_seed(0))
    program = program.with_weights([weights])
    facts = symmetry(program)
    whole = cost(program)
    line: dict[str, Any] = {"groups": len(facts.groups), "channels": facts.channels, "params": whole.params}
    for sparsity in SPARSITIES:
        start = time.process_time()
        removed = RemoveChannels(sparsity, units="both").run(program)
        small = removed.program
        line[str(sparsity)] = {
            "error": removed.record.error,
            "seconds": round(time.process_time() - start, 2),
            "groups_cut": sum(removed.record.sizes[g.index] < g.size for g in facts.groups),
            "params_ratio": round(cost(small).params / max(whole.params, 1), 4),
            "flops_ratio": round(cost(small).flops / max(whole.flops, 1), 4),
            "batches": [_runs(small, batch) for batch in (1, 5)],
        }
        if onnx and sparsity == 0.5:
            line["onnx"] = _exported(small.to(dtype=torch.float32))
    return line


@torch.no_grad()
def _runs(small: Program, batch: int) -> bool:
    """Whether the module gives finite outputs for a batch of this size."""
    size = small.example_inputs[0].shape[0]

    def sized(x: Tensor) -> Tensor:
        return x[torch.arange(batch) % size] if x.ndim and x.shape[0] == size else x

    call = small.example_call.map(lambda x: sized(x) if isinstance(x, Tensor) else x)
    outputs = named_tensors(graph_module(small)(*call.args, **call.kwargs))
    return all(not x.is_floating_point() or bool(x.isfinite().any()) for x in outputs.values())


def _exported(small: Program) -> str:
    """ "ok", or why ONNX export failed."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            export(graph_module(small), Path(folder) / "small.onnx", small.example_call)
        except Exception as error:
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    return "ok"


def passes(line: dict[str, Any]) -> bool:
    """Cut everywhere it may be, equal to the masked network, and running."""
    if "failure" in line:
        return False
    cells = [line[str(sparsity)] for sparsity in SPARSITIES]
    return all(c["error"] <= EXACT and all(c["batches"]) for c in cells) and line.get("onnx", "ok") == "ok"


# reporting ----------------------------------------------------------------------------------------------------------


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """Failures first, then a line for each network."""
    measured = {key: line for key, line in results.items() if "skipped" not in line}
    good = sum(passes(line) for line in measured.values())
    lines = ["# Structured pruning of public networks", "", __doc__.split("\n\n")[1].replace("\n", " "), ""]
    lines += [f"{good} of {len(measured)} networks measured pass.", ""]
    lines += [f"- {key}: {_why(line)}" for key, line in measured.items() if not passes(line)]
    skipped = [key for key, line in results.items() if "skipped" in line]
    lines += [f"- left out for their size: {', '.join(skipped)}"] if skipped else []
    head = ["network", "groups", "channels", "parameters left at 25, 50, 75 %", "largest error", "seconds", "ONNX"]
    rows = [_row(key, line) for key, line in measured.items() if "failure" not in line]
    return "\n".join([*lines, "", *grid(head, rows), ""])


def _row(key: str, line: dict[str, Any]) -> list[str]:
    cells = [line[str(sparsity)] for sparsity in SPARSITIES]
    return [
        key,
        str(line["groups"]),
        f"{line['channels']:,}",
        ", ".join(f"{cell['params_ratio']:.3f}×" for cell in cells),
        f"{max(cell['error'] for cell in cells):.1e}",
        f"{max(cell['seconds'] for cell in cells):.1f}",
        line.get("onnx", ""),
    ]


def _why(line: dict[str, Any]) -> str:
    if "failure" in line:
        return line["failure"]
    if line.get("onnx", "ok") != "ok":
        return f"ONNX: {line['onnx']}"
    return f"errors {', '.join('{:.1e}'.format(line[str(s)]['error']) for s in SPARSITIES)}"


# running ------------------------------------------------------------------------------------------------------------


def main(
    network: Annotated[list[str] | None, typer.Option(help="Only this network, measured anew (repeatable).")] = None,
    only: Annotated[str | None, typer.Option(help="vfx, torchvision, timm or huggingface.")] = None,
    onnx: Annotated[bool, typer.Option(help="Export at 50 % and compare in ONNX Runtime.")] = False,
    large: Annotated[bool, typer.Option(help="Networks of more than 150 million parameters too.")] = False,
    limit: Annotated[int | None, typer.Option(help="At most this many networks.")] = None,
    output: Output = RESULTS,
    fresh: Fresh = False,
    threads: Annotated[int, typer.Option(help="Torch's threads.")] = 1,
) -> None:
    """Prune public networks and check them; a run that was stopped goes on where it was."""
    if only is not None and only not in SOURCES:
        raise typer.BadParameter(f"no source {only!r}; there are {', '.join(SOURCES)}")
    known = {f"{n.source}/{n.name}": n for n in networks()}
    unknown = sorted(set(network or ()) - {n.name for n in known.values()})
    if unknown:
        raise typer.BadParameter(f"no network {unknown[0]!r}")
    output.mkdir(parents=True, exist_ok=True)
    file = output / "pruning_zoo.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    chosen = {k: n for k, n in known.items() if only in (None, n.source) and (not network or n.name in network)}
    missing = {k: n for k, n in chosen.items() if fresh or network or k not in results or "failure" in results[k]}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for key, one in progress.track(list(missing.items())[:limit], description="networks"):
            results[key] = isolated(one, onnx, threads, 1 << 62 if large else LARGE)
            line = results[key]
            verdict = "left out" if "skipped" in line else "ok" if passes(line) else _why(line)
            progress.console.print(f"{key}: {verdict}", highlight=False)
            results = {k: results[k] for k in known if k in results}
            write_atomic(file, json.dumps(results, indent=1) + "\n")
            write_atomic(output / "pruning_zoo.md", markdown(results))


def isolated(network: Network, onnx: bool, threads: int, limit: int) -> dict[str, Any]:
    """Measure in a fresh process; what goes wrong there is part of the result."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, network, onnx, threads, limit).result()
        except Exception as error:
            return {"failure": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"}


if __name__ == "__main__":
    typer.run(main)

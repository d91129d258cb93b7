"""``make bench``: what each call costs and how fast its networks run, in one JSON and one table.

- calls: VGG16 ×0.5 on 1,024 images of 32×32 in batches of 128: capture, statistics, matching by weights and by
  activations, the solve, pruning of weights and of channels, the proof of the symmetries, export; seconds of the wall
  and of the processor, and how far the peak of memory rises, in models;
- targets: the rows of ``benchmarks.speed``, ratios to bare forward passes;
- latency: an edge, the merged network, PFM (8 of 14 layers kept for each), one with half of its channels and the
  ensemble, of VGG16 and ResNet18 on images of 32×32, at batch 1 and 64, in eager mode, compiled and in ONNX Runtime:
  the processor's milliseconds as a multiple of the edge's, beside the ratio of FLOPs, the median of rounds in turns.

``--compare OLD.json`` prints what moved by more than a tenth. Weights are random. Results go to
``benchmarks/results/bench.json`` and ``bench.md``.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import onnxruntime
import torch
import torchvision
import typer
from rich.console import Console
from torch import Tensor, nn

from benchmarks.fashion import RESULTS
from benchmarks.gpu import Ensemble
from benchmarks.memory import current_memory, peak_memory, reset_peak_memory
from benchmarks.options import Output
from benchmarks.pairs_report import grid
from benchmarks.speed import Clock, document, stages
from vfx import __version__
from vfx.analyse.verify import verify
from vfx.api import collect, merge, prune, prune_structured, symmetry, trace
from vfx.emit.files import export
from vfx.files import write_atomic
from vfx.models import MODELS

PARTS = ("calls", "targets", "latency")
SIZES = {"full": (0.5, 8, 128), "small": (0.0625, 2, 8)}  # width of VGG16, batches, images in each
KINDS = {"full": ("vgg16", "resnet18"), "small": ("vgg16",)}
BATCHES, MOVED = (1, 64), 0.1
console = Console(stderr=True)
Row = dict[str, Any]


# calls --------------------------------------------------------------------------------------------------------------


def calls(size: str, folder: Path) -> Iterator[Row]:
    """Time and memory of each call on two VGG16."""
    width, count, batch = SIZES[size]
    torch.manual_seed(0)
    edges = [MODELS["vgg16"](width=width).eval() for _ in range(2)]
    images = torch.randn(count * batch, 3, 32, 32, generator=torch.Generator().manual_seed(0)).split(batch)
    x, model = images[0][:2], 4 * sum(p.numel() for p in edges[0].parameters()) / 2**20
    program = trace(edges, x)
    facts = symmetry(program)
    plain: dict[str, Any] = {"progress": False, "solve": None, "normalize": None}
    solved: dict[str, Any] = {"progress": False, "solve": "least_squares", "data": images}
    named: dict[str, Callable[[], Any]] = {
        "capture": lambda: symmetry(trace(edges, x)),
        "proof of the symmetries": lambda: verify(facts, 0),
        "statistics": lambda: collect(program, data=images, progress=False),
        "matching by weights": lambda: merge(program, match="weight", **plain),
        "matching by activations": lambda: merge(program, match="activation", data=images, **plain),
        "reconstruction": lambda: merge(program, match=None, follow=0, **solved),
        "pruning of weights": lambda: prune(edges[0], x, sparsity=0.9, score="wanda", **solved),
        "pruning of channels": lambda: prune_structured(edges[0], x, sparsity=0.5, **plain),
        "export": lambda: export(edges[0], folder / "edge.onnx", x),
    }
    for name, call in named.items():
        yield {"name": name, **measured(call, model)}


def measured(call: Callable[[], Any], model: float) -> Row:
    """Seconds of one call, and its peak of memory above what was there, as a multiple of ``model`` (MiB)."""
    before = current_memory()
    reset_peak_memory()
    start, busy = time.perf_counter(), time.process_time()
    call()
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    peak = max(peak_memory() - before, 0)
    return {"seconds": round(seconds, 3), "processor": round(busy, 3), "models": round(peak / model, 2)}


# latency ------------------------------------------------------------------------------------------------------------


def networks(kind: str, size: str) -> dict[str, tuple[nn.Module, float]]:
    """Modules to time, with their FLOPs as a multiple of an edge's."""
    torch.manual_seed(0)
    width = 1.0 if size == "full" else SIZES[size][0]
    build: Callable[[], nn.Module] = {"vgg16": lambda: MODELS["vgg16"](width=width), "resnet18": resnet18}[kind]
    edges = [build().eval() for _ in range(2)]
    x = torch.randn(2, 3, 32, 32)
    plain: dict[str, Any] = {"normalize": None, "match": None, "progress": False}
    kept = {"vgg16": 8, "resnet18": 10}[kind]
    found = {
        "merged": merge(edges, x, **plain),
        f"PFM {kept}": merge(edges, x, preserve=kept, **plain),
        "half the channels": prune_structured(edges[0], x, sparsity=0.5, solve=None, normalize=None, progress=False),
    }
    return {"edge": (edges[0], 1.0), "ensemble": (Ensemble(edges).eval(), 2.0)} | {
        name: (one.module, one.report.flops_ratio) for name, one in found.items()
    }


def resnet18() -> nn.Module:
    return torchvision.models.resnet18(num_classes=10)


def forms(module: nn.Module, folder: Path, compiled: bool) -> Iterator[tuple[str, Callable[[Tensor], Any]]]:
    """Every way to run a module."""
    yield "eager", module
    if compiled:
        yield "compiled", torch.compile(module, fullgraph=True)
    path = export(module, folder / "network.onnx", torch.randn(2, 3, 32, 32))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    (name,) = (one.name for one in session.get_inputs())
    yield "ONNX Runtime", lambda x: session.run(None, {name: x.numpy()})


@torch.no_grad()
def latency(kind: str, size: str, rounds: int, compiled: bool, folder: Path) -> Iterator[Row]:
    """Each network in each form at each batch, beside the edge in the same rounds."""
    chosen = networks(kind, size)
    torch.compiler.reset()
    runs = {name: dict(forms(module, folder, compiled)) for name, (module, _) in chosen.items()}
    for batch in BATCHES:
        x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        for form in runs["edge"]:
            times = in_turns([partial(own[form], x) for own in runs.values()], rounds)
            for (name, (_, flops)), own in zip(chosen.items(), times):
                ratio = statistics.median(a / b for a, b in zip(own, times[0]))
                row = {"network": f"{kind} {name}", "form": form, "batch": batch, "flops": round(flops, 3)}
                yield row | {"ms": round(1000 * statistics.median(own), 3), "ratio": round(ratio, 3)}


def in_turns(functions: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Processor seconds of each function in each round, so that other work on the machine counts little."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(rounds + 1):
        for own, function in zip(times, functions):
            start = time.process_time()
            function()
            if turn:
                own.append(time.process_time() - start)
    return times


# report -------------------------------------------------------------------------------------------------------------


def machine(size: str, rounds: int) -> Row:
    """Where and with what all was measured."""
    versions = {"vfx": __version__, "onnxruntime": onnxruntime.__version__, "torchvision": torchvision.__version__}
    about = {key: value for key, value in document([], rounds, "cpu").items() if key != "rows"}
    return about | versions | {"size": size}


def figures(found: Row) -> dict[str, float]:
    """Every figure by its name: processor seconds and models of calls, the targets, ratios of latency."""
    named: dict[str, float] = {}
    for row in found.get("calls", []):
        named |= {f"{row['name']}, processor s": row["processor"], f"{row['name']}, models": row["models"]}
    named |= {f"{row['name'].strip()}, {row['unit']}": row["measured"] for row in found.get("targets", [])}
    for row in found.get("latency", []):
        named[f"{row['network']}, {row['form']}, batch {row['batch']}, × edge"] = row["ratio"]
    return named


def moved(old: Row, new: Row) -> list[list[str]]:
    """Figures that are in both and differ by more than a tenth: name, before, now, their ratio."""
    before, now = figures(old), figures(new)
    both = [(name, before[name], now[name]) for name in now if name in before]
    far = [one for one in both if abs(one[2] - one[1]) > MOVED * max(abs(one[1]), 1e-3)]
    return [[name, f"{a:.3g}", f"{b:.3g}", f"{b / a:.2f}×" if a else ""] for name, a, b in far]


def markdown(found: Row) -> str:
    """The table."""
    about = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    lines = ["# What calls cost, and how fast results run", "", (__doc__ or "").split("\n\n", 1)[1].replace("``", "`")]
    lines += ["", f"Measured: {about}.", ""]
    if rows := found.get("calls"):
        cells = [[r["name"], f"{r['seconds']:.2f}", f"{r['processor']:.2f}", f"{r['models']:.1f}"] for r in rows]
        lines += [*grid(["call", "seconds", "processor, s", "peak, models"], cells), ""]
    if rows := found.get("targets"):
        cells = [[r["name"], "" if r["target"] is None else f"{r['target']:g}", f"{r['measured']:.3f}", r["unit"],
                  r["verdict"]] for r in rows]  # fmt: skip
        lines += [*grid(["target", "at most", "measured", "", ""], cells), ""]
    if rows := found.get("latency"):
        lines += [*latency_table(rows), ""]
    return "\n".join(lines)


def latency_table(rows: Sequence[Row]) -> list[str]:
    """A line a network, a column a form and batch: × the edge's, and the edge's milliseconds."""
    columns = list(dict.fromkeys((row["form"], row["batch"]) for row in rows))
    lines: dict[str, dict[Any, str]] = {}
    for row in rows:
        line = lines.setdefault(row["network"], {"flops": f"{row['flops']:.2f}×"})
        edge = row["network"].endswith(" edge")
        line[row["form"], row["batch"]] = f"{row['ms']:.2f} ms" if edge else f"{row['ratio']:.2f}×"
    head = ["network", "FLOPs", *(f"{form}, batch {batch}" for form, batch in columns)]
    return grid(head, [[name, own["flops"], *(own.get(c, "") for c in columns)] for name, own in lines.items()])


def measure(parts: Sequence[str], size: str, rounds: int, compiled: bool) -> Iterator[tuple[str, Row]]:
    """Rows as they are measured, with the part that each belongs to."""
    with tempfile.TemporaryDirectory() as folder:
        if "calls" in parts:
            yield from (("calls", row) for row in calls(size, Path(folder)))
        if "targets" in parts:
            for _, stage in stages(Clock(rounds, "cpu")):
                yield from (("targets", row) for row in document(list(stage()), rounds, "cpu")["rows"])
        if "latency" in parts:
            for kind in KINDS[size]:
                yield from (("latency", row) for row in latency(kind, size, rounds, compiled, Path(folder)))


def main(
    only: Annotated[list[str] | None, typer.Option(help="calls, targets or latency (may be repeated).")] = None,
    compare: Annotated[Path | None, typer.Option(help="A bench.json: print what moved against it.")] = None,
    rounds: Annotated[int, typer.Option(help="Measured rounds of each comparison.", min=1)] = 7,
    threads: Annotated[int, typer.Option(help="Torch's and ONNX Runtime's threads.", min=1)] = 1,
    compiled: Annotated[bool, typer.Option(help="Compile, too (needs a C++ compiler).")] = True,
    size: Annotated[str, typer.Option(help="full, or small to try it.")] = "full",
    output: Output = RESULTS,
) -> None:
    """Measure, write bench.json and bench.md, and print the table."""
    torch.set_num_threads(threads)
    old = json.loads(compare.read_text()) if compare is not None else None
    output.mkdir(parents=True, exist_ok=True)
    found: Row = {"machine": machine(size, rounds)}
    for part, row in measure(only or PARTS, size, rounds, compiled):
        console.print(part, row)
        found.setdefault(part, []).append(row)
        write_atomic(output / "bench.json", json.dumps(found, indent=1) + "\n")
        write_atomic(output / "bench.md", markdown(found))
    print(markdown(found))
    if old is not None:
        rows = moved(old, found)
        print("\n".join(grid(["moved", "before", "now", ""], rows)) if rows else "nothing moved by more than a tenth")


if __name__ == "__main__":
    typer.run(main)

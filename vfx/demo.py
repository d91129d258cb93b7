"""The main job, offline: the papers' Table 1 on scikit-learn's digits, and beside it what the default call gives.

Two small VGG16 are trained from different seeds and merged behind l preserved layers, with and without activation
matching and normalization; then by the default call, at the parameters of one edge and within 1.2 times those. Test
images are only used to fill the table: the default call chooses on the calibration images, and what it gives within 1.2
times the parameters is exported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from vfx.api import Result, collect, layers, merge, profile, trace
from vfx.data import digits
from vfx.emit.files import export, load
from vfx.files import check_writable, make_folder, write_atomic
from vfx.models import Training, accuracy, fit, predict, vgg16
from vfx.statistics.collect import Statistics

PRESERVED = (0, 3, 6, 8, 12)
BUDGETS = (1.0, 1.2)  # parameters of the default call's results, against one edge
SEEDS = (0, 1)
COLORS = ("#56b4e9", "#d55e00", "#009e73", "#cc79a7", "#0072b2")  # of the plot's lines, told apart by all eyes
LABEL_GAP = 4.0  # points of accuracy between the names of lines
COLUMNS: dict[str, tuple[str | None, str | None]] = {  # title: (match, normalize)
    "Direct": (None, None),
    "AM": ("activation", None),
    "AM + REPAIR": ("activation", "repair"),
    "AM + RESCALE": ("activation", "rescale"),
    "AM + Bias Cal.": ("activation", "bias_calibration"),
}


@dataclass(frozen=True)
class DemoRow:
    """A line of the table: accuracies in % by column, parameters and FLOPs against one edge."""

    name: str
    accuracy: dict[str, float]
    params: int
    params_ratio: float
    flops: int
    flops_ratio: float


def run(
    out: Path, *, width: float = 0.25, epochs: int = 15, seeds: Sequence[int] = SEEDS, retrain: bool = False
) -> None:
    """Train (or reuse) the edges, merge them, print the table and write table, plot and ONNX model to ``out``."""
    console = Console()
    make_folder(out)
    for name in ("merged.onnx", "table.json", "accuracy.png"):
        check_writable(out / name)
    train_x, train_y, test_x, test_y = digits()
    edges = [_edge(out, train_x, train_y, width, epochs, seed, retrain, console) for seed in seeds]
    rows, chosen = _rows(edges, train_x, train_y, test_x, test_y)
    console.print(_table(rows))
    write_atomic(out / "table.json", json.dumps([asdict(row) for row in rows], indent=2).encode())
    plot(rows, out / "accuracy.png")
    export(chosen, out / "merged.onnx")
    console.print(
        f"Wrote {out / 'merged.onnx'} (checked in ONNX Runtime), {out / 'table.json'}, {out / 'accuracy.png'}"
    )


def _edge(
    out: Path, x: Tensor, y: Tensor, width: float, epochs: int, seed: int, retrain: bool, console: Console
) -> nn.Module:
    """One trained edge, from its checkpoint if an earlier run left one."""
    torch.manual_seed(seed)
    model = vgg16(width=width, in_channels=1)
    path = out / f"vgg16_w{width:g}_e{epochs}_s{seed}.safetensors"
    if path.is_file() and not retrain:
        console.print(f"Edge {seed}: reusing {path}")
        return load(path, model)
    console.print(f"Edge {seed}: training VGG16 ×{width:g} for {epochs} epochs on {len(x)} digits")
    fit(model, x, y, Training(epochs, lr=0.1, batch_size=64, seed=seed))
    export(model, path)
    return model


def _rows(
    edges: list[nn.Module], train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor
) -> tuple[list[DemoRow], Result]:
    program = trace(edges, train_x[:2])
    statistics = collect(program, data=train_x)
    cost = profile(program)
    score: Callable[[nn.Module], float] = lambda module: 100 * accuracy(module, test_x, test_y)  # noqa: E731
    rows = [DemoRow(f"Edge {i}", {"": score(edge)}, cost.params, 1.0, cost.flops, 1.0) for i, edge in enumerate(edges)]
    votes = torch.stack([predict(edge, test_x).softmax(-1) for edge in edges]).mean(0)
    ensemble = 100 * float((votes.argmax(-1) == test_y).float().mean())
    count = len(edges)
    rows.append(DemoRow("Ensemble", {"": ensemble}, count * cost.params, count, count * cost.flops, count))
    total = len(layers(program))
    with Progress(transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task("merging", total=len(PRESERVED) * len(COLUMNS) + len(BUDGETS))
        for preserve in PRESERVED:
            results = {}
            for title, (match, normalize) in COLUMNS.items():
                results[title] = _merge(program, statistics, train_x, match, normalize, preserve)
                bar.advance(task)
            rows.append(_row(f"PFM {preserve}/{total}", results, score))
        for budget in BUDGETS:
            limit = {"params": budget} if budget > 1 else None
            chosen = merge(program, data=train_x, statistics=statistics, budget=limit, progress=False)
            rows.append(_default(f"Default {budget:g}×", chosen, score))
            bar.advance(task)
    return rows, chosen


def _default(name: str, result: Result, score: Callable[[nn.Module], float]) -> DemoRow:
    report = result.report
    profile, ratios = report.profile, (report.params_ratio, report.flops_ratio)
    return DemoRow(name, {"": score(result.module)}, profile.params, ratios[0], profile.flops, ratios[1])


def _merge(
    program: object, statistics: Statistics, data: Tensor, match: str | None, normalize: str | None, preserve: int
) -> Result:
    return merge(
        program,  # type: ignore[arg-type]
        data=data,
        match=match,
        classes="permutation",  # as in the papers
        normalize=normalize,
        preserve=preserve,
        statistics=statistics,
        progress=False,
    )


def _row(name: str, results: dict[str, Result], score: Callable[[nn.Module], float]) -> DemoRow:
    report = results["AM + RESCALE"].report
    return DemoRow(
        name,
        {title: score(result.module) for title, result in results.items()},
        report.profile.params,
        report.params_ratio,
        report.profile.flops,
        report.flops_ratio,
    )


def _table(rows: list[DemoRow]) -> Table:
    table = Table(title="Accuracy in %, two VGG16 on digits (the papers' Table 1)")
    table.add_column("Model", no_wrap=True)
    for title in COLUMNS:
        table.add_column(title, justify="right")
    table.add_column("Params", justify="right")
    table.add_column("FLOPs", justify="right")
    last = [row.name for row in rows if "" not in row.accuracy][-1]
    for row in rows:
        single = row.accuracy.get("")
        cells = [f"{single:.2f}"] if single is not None else [f"{row.accuracy[title]:.2f}" for title in COLUMNS]
        cells += [""] * (len(COLUMNS) - len(cells))
        cost = (f"{row.params_ratio:.3f}×", f"{row.flops_ratio:.3f}×")
        table.add_row(row.name, *cells, *cost, end_section=row.name in ("Ensemble", last))
    return table


def plot(rows: list[DemoRow], path: Path) -> None:
    """Accuracy against parameters, one line for each column of the table, named where it starts."""
    from matplotlib.figure import Figure

    from vfx.diagnosis.figures import png

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    merged = [row for row in rows if "" not in row.accuracy]
    given = [row for row in rows if "" in row.accuracy]
    networks, defaults = given[: -len(BUDGETS)], given[-len(BUDGETS) :]
    starts = spread([merged[0].accuracy[title] for title in COLUMNS], LABEL_GAP)
    for (title, start), color, marker in zip(zip(COLUMNS, starts), COLORS, "vos^D"):
        ratios, accuracies = [row.params_ratio for row in merged], [row.accuracy[title] for row in merged]
        axes.plot(ratios, accuracies, marker=marker, color=color)
        axes.text(ratios[0] - 0.025, start, title, ha="right", va="center", fontsize=8, color=color)
    lowest, highest = (pick(row.accuracy[""] for row in networks) for pick in (min, max))
    axes.axhspan(lowest, highest, color="0.8", linewidth=1)
    label = f"edges and ensemble, {lowest:.1f} to {highest:.1f} %"
    axes.text(0.6, highest + 1, label, ha="center", fontsize=8, transform=axes.get_yaxis_transform())
    axes.plot([row.params_ratio for row in defaults], [row.accuracy[""] for row in defaults], "k*", markersize=13)
    axes.text(defaults[0].params_ratio - 0.025, defaults[0].accuracy[""] + 1, "default call", ha="right", fontsize=8)
    for index, row in enumerate(merged):
        height = 2 + 4 * (index % 2)  # the first cuts cost so little that their labels would overlap
        axes.annotate(row.name.removeprefix("PFM "), (row.params_ratio, height), ha="center", fontsize=8, color="0.3")
    axes.set(xlabel="parameters (× one edge)", ylabel="test accuracy (%)", xlim=(0.78, None), ylim=(0, 104))
    axes.set_title("Merging two VGG16 behind l preserved layers (PFM l/L)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    write_atomic(path, png(figure, 150))


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights moved upwards, in their order, until neighbours are at least ``gap`` apart."""
    moved, last = dict.fromkeys(range(len(heights)), 0.0), float("-inf")
    for index in sorted(moved, key=lambda place: heights[place]):
        last = moved[index] = max(heights[index], last + gap)
    return list(moved.values())

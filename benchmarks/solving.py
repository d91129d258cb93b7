"""The default call of ``vfx.merge`` on the trained Fashion-MNIST pairs, with the controls that a sceptic asks for.

Calibration reads the first 2,000 training images without labels, accuracy is over the test images. For each pair: the
edges and their ensemble; the default call at the parameters of one edge and within budgets of 1.1 and 1.2 times those;
every candidate that it chose from, made of all images (regret: the best of them on test images minus the chosen one);
and two controls in the chosen setting: the followed edge merged with a copy of itself, and the followed (or first) edge
distilled from the ensemble by SGD on the same images for the same seconds (learning rate and batch of ``DISTILL``).
Differences to an edge carry the standard error of the paired difference over test images.

Results go to ``benchmarks/results``: solving.json and solving.md, written after each pair; a run that was stopped
goes on where it was.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from benchmarks.fashion import CHECKPOINTS, FASHION_MNIST, PAIRS, RESULTS, Pair, command, fashion_mnist
from benchmarks.options import Checkpoints, DataFolder, Fresh, Output, Samples
from benchmarks.pairs_report import grid
from vfx.api import merge, trace
from vfx.files import write_atomic
from vfx.models.training import predict

CALIBRATION = 2000
BUDGETS = (1.1, 1.2)
DISTILL = {"lr": 0.01, "momentum": 0.9, "batch": 128}
console = Console(stderr=True)


class Subject:
    """A pair with the data it is merged and measured on."""

    def __init__(self, pair: Pair, checkpoints: Path, data: Path, samples: int | None):
        self.models = pair.edges(checkpoints)
        self.train, _ = fashion_mnist(data, "train", CALIBRATION)
        self.images, self.labels = fashion_mnist(data, "test", samples)
        self.program = trace(self.models, self.train[:2])

    def right(self, module: nn.Module) -> Tensor:
        """Which test images a network decides rightly, 1.0 or 0.0."""
        return (predict(module, self.images, 250).argmax(1) == self.labels).double()

    def merge(self, models: Any = None, **options: Any) -> Any:
        return merge(
            self.program if models is None else models, self.train[:2], data=self.train, progress=False, **options
        )

    def measure(self, known: Mapping[str, float]) -> dict[str, Any]:
        """All figures of the pair; candidates whose accuracy is ``known`` are not made again."""
        edges = [self.right(model) for model in self.models]
        ensemble = sum(predict(model, self.images, 250).softmax(1) for model in self.models)
        assert isinstance(ensemble, Tensor)
        found: dict[str, Any] = {
            "test_images": len(self.images),
            "edges": [_percent(x) for x in edges],
            "ensemble": _percent((ensemble.argmax(1) == self.labels).double()),
        }
        start = time.perf_counter()
        default = self.merge()
        seconds = time.perf_counter() - start
        found["default"] = self._row(default, edges) | {"seconds": round(seconds, 1)}
        found["scores"] = {name: score["divergence"] for name, score in default.report.scores.items()}
        found["budgets"] = {str(b): self._row(self.merge(budget={"params": b}), edges) for b in BUDGETS}
        found["candidates"] = dict(self._candidates(default, known))
        best = max(found["candidates"].values())
        found["regret"] = round(best - found["default"]["accuracy"], 2)
        choices = default.report.choices
        edge = choices.get("follow_edge", choices.get("edge", 0))
        follow = choices.get("follow", 0)
        twin = self.merge([self.models[edge], copy.deepcopy(self.models[edge])], solve="least_squares", follow=follow)
        found["copy"] = self._row(twin, edges)
        found["distilled"] = {"accuracy": _percent(self.right(self._distilled(edge, seconds)))}
        return found

    def _row(self, result: Any, edges: list[Tensor]) -> dict[str, Any]:
        right = self.right(result.module)
        gains = [(right - edge) * 100 for edge in edges]
        return {
            "accuracy": _percent(right),
            "params_ratio": round(result.report.params_ratio, 4),
            "flops_ratio": round(result.report.flops_ratio, 4),
            "outcome": result.report.outcome,
            "gains": [[round(float(g.mean()), 2), round(float(g.std() / len(g) ** 0.5), 2)] for g in gains],
        }

    def _candidates(self, default: Any, known: Mapping[str, float]) -> Iterator[tuple[str, float]]:
        """The test accuracy of everything that was tried, made of all images."""
        for name in default.report.scores:
            if name in known:
                yield name, known[name]
                continue
            if name.startswith("edge "):
                yield name, _percent(self.right(self.models[int(name.removeprefix("edge "))]))
                continue
            options: dict[str, Any] = {"solve": None, "normalize": None if name == "none" else name}
            if name.startswith("least squares"):
                words = name.split()
                follow, edge = (int(words[4]), int(words[7])) if "behind" in words else (0, 0)
                options = {"solve": "least_squares", "follow": follow} | ({"follow_edge": edge} if follow else {})
            if name == "repair, activation":
                continue
            yield name, _percent(self.right(self.merge(**options).module))

    def _distilled(self, edge: int, seconds: float) -> nn.Module:
        """An edge trained towards the ensemble's probabilities, without labels, until the time is up."""
        with torch.no_grad():
            goals = torch.stack([predict(m, self.train, 250).softmax(1) for m in self.models]).mean(0)
        student = copy.deepcopy(self.models[edge]).eval()  # running statistics stay
        for parameter in student.parameters():
            parameter.requires_grad_(True)
        optimizer = torch.optim.SGD(student.parameters(), lr=DISTILL["lr"], momentum=DISTILL["momentum"])
        generator, start = torch.Generator().manual_seed(0), time.perf_counter()
        while True:
            for rows in torch.randperm(len(self.train), generator=generator).split(int(DISTILL["batch"])):
                if time.perf_counter() - start > seconds:
                    return student
                optimizer.zero_grad()
                loss = -(goals[rows] * student(self.train[rows]).log_softmax(1)).sum(1).mean()
                loss.backward()
                optimizer.step()


def _percent(right: Tensor) -> float:
    return round(100 * float(right.mean()), 2)


def markdown(results: dict[str, Any]) -> str:
    lines = ["# The default call on the trained pairs", "", __doc__.split("\n\n")[1].replace("\n", " "), ""]
    head = [
        "pair",
        "edges",
        "ensemble",
        "default, 1×",
        "against each edge",
        "regret",
        "copy",
        "SGD",
        "≤ 1.1×",
        "≤ 1.2×",
    ]
    rows = []
    for name, found in results.items():
        gains = ", ".join(f"{gain:+.2f} ± {error:.2f}" for gain, error in found["default"]["gains"])
        budgets = [
            f"{found['budgets'][str(b)]['accuracy']:.2f} ({found['budgets'][str(b)]['params_ratio']:.3f}×)"
            for b in BUDGETS
        ]
        rows.append([
            name, " / ".join(f"{x:.2f}" for x in found["edges"]), f"{found['ensemble']:.2f}",
            f"{found['default']['accuracy']:.2f}", gains, f"{found['regret']:.2f}", f"{found['copy']['accuracy']:.2f}",
            f"{found['distilled']['accuracy']:.2f}", *budgets,
        ])  # fmt: skip
    lines += [*grid(head, rows), ""]
    for name, found in results.items():
        lines += [f"## {name}", "", f"Default ({found['default']['seconds']} s): {found['default']['outcome']}.", ""]
        for budget, row in found["budgets"].items():
            gains = ", ".join(f"{gain:+.2f} ± {error:.2f}" for gain, error in row["gains"])
            lines.append(f"Within {budget}×: {row['outcome']}; against the edges {gains}.")
            lines.append("")
        scores = found["scores"]
        table = [[n, f"{scores[n]:.4f}", f"{a:.2f}"] for n, a in found["candidates"].items()]
        lines += [*grid(["candidate", "held-out divergence", "test accuracy"], table), ""]
    return "\n".join(lines)


def main(
    checkpoints: Checkpoints = CHECKPOINTS,
    data: DataFolder = FASHION_MNIST,
    output: Output = RESULTS,
    pair: Annotated[list[str] | None, typer.Option(help="Only this pair (may be repeated).")] = None,
    samples: Samples = None,
    fresh: Fresh = False,
    threads: Annotated[int, typer.Option(help="Torch's threads; 0 leaves its choice.")] = 0,
) -> None:
    """Merge the trained pairs by the default call and write solving.json and solving.md."""
    if threads:
        torch.set_num_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    file = output / "solving.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() and not fresh else {}
    for name in pair or list(PAIRS):
        if name in results and not pair:
            continue
        console.print(name)
        known = {} if fresh else results.get(name, {}).get("candidates", {})
        results[name] = Subject(PAIRS[name], checkpoints, data, samples).measure(known)
        results = {known: results[known] for known in PAIRS if known in results}
        write_atomic(file, json.dumps(results, indent=1) + "\n")
        write_atomic(file.with_suffix(".md"), markdown(results))


if __name__ == "__main__":
    command(main)

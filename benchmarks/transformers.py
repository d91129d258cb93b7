"""Barriers between transformers trained from different seeds: permutations against the whole symmetry classes.

Pairs of small ViTs (scikit-learn's digits, Fashion-MNIST) and GPT-2s (characters of Python's language reference) are
trained here and kept in ``--cache``. Each method aligns the second edge once; the merged network's loss and accuracy
are then measured at 11 values of α, without normalization, as in *Generalized Linear Mode Connectivity for
Transformers* (Theus et al., NeurIPS 2025). At the ends stand the aligned edges, so their losses prove that each kept
its function. Results go to ``benchmarks/results``: transformers.json, .md and .png, written after each method; a run
that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.fashion import FASHION_MNIST, RESULTS, MissingData, command, fashion_mnist
from benchmarks.options import Cache, DataFolder, Fresh, Output, Render
from benchmarks.transformers_report import draw, markdown
from vfx.api import merge, trace
from vfx.data import digits, text
from vfx.diagnosis.barrier import Evaluator
from vfx.diagnosis.curve import Curve
from vfx.files import write_atomic
from vfx.match.learned import LearnedMatching
from vfx.match.matcher import Known, Matcher
from vfx.models import Training, ViT, fit, gpt_tiny
from vfx.models.training import augment
from vfx.program import Program

SEEDS = (0, 1)
POINTS, BATCH, SAMPLES = 11, 128, 2000
console = Console(stderr=True)
Data = tuple[Tensor, Tensor, Tensor, Tensor]  # train_x, train_y, test_x, test_y


@dataclass(frozen=True)
class Method:
    """What aligns the second edge: a match, the maps it may use, and what is done to the edges before."""

    match: str | None
    classes: str = "full"
    prepare: str | None = None

    @property
    def key(self) -> tuple[str | None, str, str | None]:
        return self.match, self.classes, self.prepare


METHODS = (
    Method(None),
    *(
        Method(match, classes, prepare)
        for match in ("weight", "activation")
        for classes, prepare in (("permutation", None), ("permutation", "lift"), ("full", None), ("full", "lift"))
    ),
    Method("learned", "full", "lift"),
)


@dataclass(frozen=True)
class Learning:
    """From how many training samples a matching is learnt, without labels, each taken so many times, varied as in
    training; in how many epochs of which batches, the rate, and how far α is drawn from ½: the whole curve is judged.
    """

    samples: int
    times: int
    epochs: int
    batch: int
    lr: float
    spread: float = 0.1
    orders: float = 1.0

    def __str__(self) -> str:
        orders = "" if self.orders == 1 else f" ({self.orders:.2g} of it for permutations)"
        return (
            f"learned matching: {self.epochs} epochs over {self.times} × {self.samples:,} training samples without "
            f"labels, varied as in training, in batches of {self.batch}, rate {self.lr:g}{orders}, α in ½ ± "
            f"{self.spread:g}"
        )


@dataclass(frozen=True)
class Pair:
    """Two networks of one architecture, how they are trained, on what, and how many samples calibrate."""

    name: str
    title: str
    setting: str
    build: Callable[[], nn.Module]
    load: Callable[[Path], Data]
    epochs: int
    batch: int
    calibration: int
    learning: Learning
    lr: float = 2e-3
    augment: bool = True
    shift: int = 2
    flip: bool = False

    def edges(self, data: Data, cache: Path, epochs: int) -> list[nn.Module]:
        return [self._edge(seed, data, cache, epochs) for seed in SEEDS]

    def _edge(self, seed: int, data: Data, cache: Path, epochs: int) -> nn.Module:
        """One trained network, from the cache if it is there."""
        torch.manual_seed(seed)
        model = self.build()
        file = cache / f"transformers_{self.name}_e{epochs}_s{seed}.safetensors"
        if file.is_file():
            model.load_state_dict(load_file(file))
            return model.eval()
        console.print(f"training {self.title}, seed {seed}")
        own: dict[str, Any] = {"augment": self.augment, "shift": self.shift, "flip": self.flip, "seed": seed}
        fit(model, *data[:2], Training(epochs, self.lr, self.batch, weight_decay=0.05, adam=True, **own))
        cache.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), file)
        return model

    def describe(self, epochs: int) -> str:
        order = f"{epochs} epochs in batches of {self.batch}, AdamW, rate {self.lr:g} falling linearly, decay 0.05"
        return (
            f"{self.setting}; {order}; {self.calibration:,} training samples for activation matching; {self.learning}"
        )

    def learnt_from(self, train: Tensor) -> tuple[Tensor, ...]:
        """The batches of learned matching."""
        how, generator = self.learning, torch.Generator().manual_seed(0)
        chosen = train[torch.randperm(len(train), generator=generator)[: how.samples]].repeat(
            how.times, *[1] * (train.ndim - 1)
        )
        varied = augment(chosen, self.shift, self.flip, generator) if self.augment else chosen
        return varied[torch.randperm(len(varied), generator=generator)].split(how.batch)


def _fashion(folder: Path) -> Data:
    return *fashion_mnist(folder, "train"), *fashion_mnist(folder, "test")


PAIRS = {
    pair.name: pair
    for pair in (
        Pair(
            "vit_digits", "ViT, digits",
            "4 blocks of 64 channels and 4 heads, 16 patches; 1,297 digits of 16×16 pixels",
            partial(ViT, 16, 4, 64, 4, 4, 1, 10), lambda _: digits(16), 100, 64, 1297,
            Learning(1297, 4, 4, 64, 0.01), shift=1,
        ),
        Pair(
            "vit_fashion", "ViT, Fashion-MNIST",
            "3 blocks of 64 channels and 4 heads, 16 patches; 60,000 images of 32×32 pixels",
            partial(ViT, 32, 8, 64, 3, 4, 1, 10), _fashion, 4, 128, 2000,
            Learning(60_000, 1, 7, 128, 0.01, 0.2), flip=True,
        ),
        Pair(
            "gpt_text", "GPT-2, characters",
            "4 blocks of 96 channels and 4 heads, untied head, 64 characters of context; text of Python "
            f"{platform.python_version()}",
            partial(gpt_tiny, 0.75), lambda _: text(), 2, 32, 256,
            Learning(26_000, 1, 3, 32, 0.01, 0.15, 1 / 6), augment=False,
        ),
    )
}  # fmt: skip


class Subject:
    """The edges of a pair as one Program, with the samples that calibrate and those that are measured on."""

    def __init__(self, edges: Sequence[nn.Module], data: Data, pair: Pair, samples: int):
        train, _, inputs, labels = data
        self.pair, self.train = pair, train
        self.program = trace(list(edges), train[:2])
        self.calibration = train[:: max(1, len(train) // pair.calibration)][: pair.calibration].split(BATCH)
        self.batches = list(zip(inputs[:samples].split(BATCH), labels[:samples].split(BATCH)))

    def score(self, program: Program) -> tuple[float, float]:
        """Accuracy (share) and mean loss of a single-edge Program."""
        return Evaluator(program, self.batches)(program)

    def facts(self) -> dict[str, Any]:
        edges = [self.score(self.program.select(edge)) for edge in range(self.program.edges)]
        return {
            "parameters": sum(tensor.numel() for tensor in self.program.weights[0].values()),
            "test_samples": sum(len(labels) for _, labels in self.batches),
            "edges": [{"accuracy": accuracy, "loss": loss} for accuracy, loss in edges],
        }

    def _by(self, method: Method) -> tuple[str | Matcher | None, Sequence[Tensor] | None]:
        """What matches, and the data that it reads."""
        if method.match == "learned":
            how = self.pair.learning
            by = LearnedMatching(how.epochs, how.lr, spread=how.spread, orders=how.orders, loss="distillation")
            return by, self.pair.learnt_from(self.train)
        return method.match, self.calibration if method.match == "activation" else None

    @torch.no_grad()
    def measure(self, method: Method) -> dict[str, Any]:
        """The curve of one method, with the time and the proof of its alignment."""
        known: dict[str, Any] = {"prepare": method.prepare, "normalize": None, "progress": False}
        begin = time.perf_counter()
        match, samples = self._by(method)
        first = merge(self.program, data=samples, match=match, classes=method.classes, weights=0.5, solve=None, **known)
        seconds = time.perf_counter() - begin
        found = first.report.matching
        alphas = [index / (POINTS - 1) for index in range(POINTS)]
        scores = []
        for alpha in alphas:
            again = {"match": Known(found) if found else None, "weights": alpha, "verify": False}
            scores.append(self.score(first.program if alpha == 0.5 else merge(self.program, **again, **known).program))
        accuracy, loss = zip(*scores)
        curve = Curve(method.match, None, tuple(alphas), accuracy, loss)
        about = {"classes": method.classes, "prepare": method.prepare, "seconds": round(seconds, 2)}
        return curve.to_dict() | about | {"verify_error": first.report.verify_error, "notes": list(first.report.notes)}


def cell_key(cell: dict[str, Any]) -> tuple[Any, ...]:
    return cell["match"], cell["classes"], cell["prepare"]


def measure(
    pair: Pair, edges: Sequence[nn.Module], data: Data, known: dict[str, Any], epochs: int, samples: int
) -> Iterator[dict[str, Any]]:
    """The pair's results after every method; what is known of the same networks and samples is kept."""
    subject = Subject(edges, data, pair, samples)
    result = {"title": pair.title, "setting": pair.describe(epochs)} | subject.facts()
    same = all(known.get(name) == value for name, value in result.items())
    result["curves"] = list(known["curves"]) if same else []
    order = [method.key for method in METHODS]
    done = {cell_key(cell) for cell in result["curves"]}
    left = [method for method in METHODS if method.key not in done]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for method in progress.track(left, description=pair.title):
            curves = [*result["curves"], subject.measure(method)]
            result["curves"] = sorted(curves, key=lambda curve: order.index(cell_key(curve)))
            yield result
    yield result


def main(
    cache: Cache = Path("demo"),
    data: DataFolder = FASHION_MNIST,
    output: Output = RESULTS,
    pair: Annotated[list[str] | None, typer.Option(help="Only this pair (may be repeated).")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of training (default: each pair's own).", min=1)] = None,
    samples: Annotated[int, typer.Option(help="Test samples to use at most.", min=1)] = SAMPLES,
    train: Annotated[bool, typer.Option(help="Only train the networks.")] = False,
    fresh: Fresh = False,
    render: Render = False,
    threads: Annotated[int, typer.Option(help="Torch's threads.")] = 1,
) -> None:
    """Train the pairs (or take them from the cache), measure their barriers by every method, write table and plot."""
    unknown = sorted(set(pair or ()) - set(PAIRS))
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is unknown; there are {', '.join(PAIRS)}")
    torch.set_num_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    file = output / "transformers.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    chosen = [] if render else [PAIRS[name] for name in pair or PAIRS]
    absent: list[MissingData] = []
    for one in chosen:
        try:
            loaded = one.load(data)
        except MissingData as error:
            absent.append(error)
            console.print(f"[yellow]{one.title} not measured:[/] {error}")
            continue
        count = epochs or one.epochs
        edges = one.edges(loaded, cache, count)
        known = {} if fresh else results.get(one.name, {})
        for found in () if train else measure(one, edges, loaded, known, count, samples):
            results[one.name] = found
            results = {name: results[name] for name in PAIRS if name in results}
            write_atomic(file, json.dumps(results, indent=1) + "\n")
            write_atomic(output / "transformers.md", markdown(results))
    if chosen and len(absent) == len(chosen):
        raise absent[0]
    if results:
        write_atomic(output / "transformers.md", markdown(results))
        draw(results, output / "transformers.png")
        console.print(f"wrote {file}, transformers.md and transformers.png")


if __name__ == "__main__":
    command(main)

"""Networks fine-tuned from one checkpoint on four tasks, merged into one trunk: the methods for a common base.

A ViT-Tiny of a third of its width is trained to tell rotations and fine-tuned on digits, Fashion-MNIST's classes 0–4
and 5–9, and Fashion-MNIST upside down (``benchmarks.common_base_networks``; kept in ``--cache``). The trunk is merged,
each task keeps its own head (``heads=1``), and accuracy is over each task's test images. Methods run with the defaults
of ``vfx.combine``; where one has a scale, it is also chosen among ``SCALES`` by the accuracy on 400 training images
with labels of each task. RegMean, RegMean++, ``vfx.OwnOutputs`` and the default call read 512 training images of each
task without labels.
Results go to ``benchmarks/results``: common_base.json, .md. Rows already there are kept (``--fresh`` measures anew).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from benchmarks.common_base_networks import FINE_TUNED, PRETRAINED, TASKS, data_of, trained
from benchmarks.fashion import FASHION_MNIST, RESULTS, command
from benchmarks.options import Cache, DataFolder, Fresh, Output, Render
from benchmarks.train import TRAINED
from vfx.api import merge
from vfx.combine.combiner import Combiner
from vfx.combine.dare import Dare
from vfx.combine.iso import IsoC
from vfx.combine.own_outputs import OwnOutputs
from vfx.combine.regmean import RegMean
from vfx.combine.regmean_plus import RegMeanPlus
from vfx.combine.task_arithmetic import TaskArithmetic
from vfx.combine.ties import Ties
from vfx.files import write_atomic

CALIBRATION, CHOOSING = 512, 400  # training images of each task: without labels, and with them to choose a scale
SCALES = (0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.3, 1.6)
BATCH = 250
console = Console(stderr=True)
Tests = Sequence[tuple[Tensor, Tensor]]  # images and labels of each task
SCALED: dict[str, Callable[[float], Combiner]] = {
    "task arithmetic": TaskArithmetic,
    "TIES": lambda scale: Ties(scale=scale),
    "DARE": lambda scale: Dare(by=TaskArithmetic(scale)),
    "Iso-C": IsoC,
}
USUAL = {"task arithmetic": 0.4, "TIES": 1.0, "DARE": 0.4, "Iso-C": 1.0}


@dataclass(frozen=True, eq=False)
class Subject:
    """The base, the fine-tuned networks, and images of each task: calibration, labelled ones to choose by, tests."""

    base: nn.Module
    edges: list[nn.Module]
    calibration: list[Tensor]
    choosing: Tests
    tests: Tests

    def merged(self, **options: Any) -> nn.Module:
        """The networks merged, each task with its own head."""
        return merge(self.edges, self.calibration[0][:2], heads=1, verify=False, progress=False, **options).module

    def combined(self, combine: Combiner) -> nn.Module:
        return self.merged(base=self.base, combine=combine, normalize=None)


@torch.no_grad()
def accuracies(outputs: Callable[[int, Tensor], Tensor], tests: Tests) -> list[float]:
    """The share of each task's test images, in percent, that the task's own head decides rightly."""
    found = []
    for task, (images, labels) in enumerate(tests):
        decided = torch.cat([outputs(task, batch).argmax(1) for batch in images.split(BATCH)])
        found.append(100 * float((decided == labels).double().mean()))
    return found


def of_heads(network: nn.Module, task: int, images: Tensor) -> Tensor:
    return network(images)[task]  # type: ignore[no-any-return]


def on_base(subject: Subject, task: int, images: Tensor) -> Tensor:
    """What a task's head gives on the base's trunk: the control that nothing was merged."""
    state = subject.base.state_dict() | {k: x for k, x in subject.edges[task].state_dict().items() if "head." in k}
    return torch.func.functional_call(subject.edges[task], state, images)  # type: ignore[no-any-return]


def rows(subject: Subject, wanted: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    """A row for each method that is ``wanted``."""
    singles: dict[str, Callable[[int, Tensor], Tensor]] = {
        "individual": lambda task, images: subject.edges[task](images),
        "base's trunk": partial(on_base, subject),
    }
    for name, outputs in singles.items():
        if wanted(name):
            yield row(name, "", outputs, subject.tests, 0.0)
    yield from (measured(subject, *method) for method in methods(subject) if wanted(method[0]))
    for name, make in SCALED.items():
        if wanted(f"{name}, scale chosen"):
            begin = time.perf_counter()
            means = {scale: _chosen_by(subject, make(scale)) for scale in SCALES}
            best = max(means, key=lambda scale: means[scale])
            found = measured(subject, f"{name}, scale chosen", f"scale {best:g}", partial(subject.combined, make(best)))
            yield found | {"seconds": round(time.perf_counter() - begin, 1)}


def methods(subject: Subject) -> Iterator[tuple[str, str, Callable[[], nn.Module]]]:
    """Names, settings, and what makes the networks."""
    plain = {"match": None, "normalize": None, "solve": None}
    yield "simple average", "", partial(subject.merged, **plain)
    for name, make in SCALED.items():
        yield name, f"scale {USUAL[name]:g}", partial(subject.combined, make(USUAL[name]))
    data = subject.calibration
    kinds: dict[str, Callable[..., Combiner]] = {
        "RegMean": RegMean,
        "RegMean++": RegMeanPlus,
        "own outputs": OwnOutputs,
    }
    for title, kind in kinds.items():
        yield (
            title,
            "" if kind is OwnOutputs else "off_diagonal 0.9",
            partial(subject.merged, match=None, normalize=None, combine=kind(data)),
        )
    yield "vfx's default call", "", partial(subject.merged, data=[part for own in data for part in own.split(128)])


def measured(subject: Subject, name: str, settings: str, make: Callable[[], nn.Module]) -> dict[str, Any]:
    begin = time.perf_counter()
    network = make().eval()
    seconds = time.perf_counter() - begin
    return row(name, settings, partial(of_heads, network), subject.tests, seconds)


def _chosen_by(subject: Subject, combine: Combiner) -> float:
    return statistics.fmean(accuracies(partial(of_heads, subject.combined(combine).eval()), subject.choosing))


def row(
    name: str, settings: str, outputs: Callable[[int, Tensor], Tensor], tests: Tests, seconds: float
) -> dict[str, Any]:  # fmt: skip
    found = accuracies(outputs, tests)
    console.print(f"{name}: {statistics.fmean(found):.2f} %")
    each = {task: round(own, 2) for task, own in zip(TASKS, found)}
    return {"name": name, "settings": settings, "tasks": each, "average": round(statistics.fmean(found), 2),
            "seconds": round(seconds, 1)}  # fmt: skip


def markdown(facts: dict[str, Any]) -> str:
    """The table, with what the networks are."""
    training = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in facts["training"].items())
    lines = [
        "# Networks of a common base", "",
        f"`python -m benchmarks.common_base`; one thread, training: {training}. ViT-Tiny ×1/3 (patches of 8), one run, "
        f"test images: {', '.join(f'{task} {count:,}' for task, count in facts['tests'].items())}.", "",
        "Accuracy in % of one merged trunk with each task's own head; seconds to merge (with the choice of the scale, "
        "where there is one; it reads 400 labelled training images of each task).", "",
        f"| method | settings | {' | '.join(TASKS)} | average | seconds |",
        "| --- | --- |" + " --- |" * (len(TASKS) + 2),
    ]  # fmt: skip
    chance = [100 / classes for classes in TASKS.values()]
    lines.append(f"| chance | | {' | '.join(f'{x:.2f}' for x in chance)} | {statistics.fmean(chance):.2f} | |")
    for own in facts["rows"]:
        each = " | ".join(f"{own['tasks'][task]:.2f}" for task in TASKS)
        lines.append(f"| {own['name']} | {own['settings']} | {each} | {own['average']:.2f} | {own['seconds']:.1f} |")
    return "\n".join(lines) + "\n"


def subject_of(data: Path, cache: Path) -> Subject:
    """The trained networks and their data; trains what is missing."""
    base, *edges = (trained(recipe, data, cache) for recipe in (PRETRAINED, *FINE_TUNED))
    own = [data_of(task, data) for task in TASKS]
    choosing = [(images[-CHOOSING:], labels[-CHOOSING:]) for images, labels, _, _ in own]
    tests = [(images, labels) for _, _, images, labels in own]
    return Subject(base, edges, [images[:CALIBRATION] for images, *_ in own], choosing, tests)


def main(
    data: DataFolder = FASHION_MNIST,
    cache: Cache = TRAINED,
    output: Output = RESULTS,
    only: Annotated[list[str] | None, typer.Option(help="Only this method (may be repeated).")] = None,
    fresh: Fresh = False,
    render: Render = False,
) -> None:
    """Train, merge, measure, and write the table."""
    file = output / "common_base.json"
    identity = [recipe.digest for recipe in (PRETRAINED, *FINE_TUNED)]
    facts = json.loads(file.read_text()) if file.is_file() else {}
    if facts.get("networks") != identity:
        facts = {"networks": identity, "rows": []}
    if not render:
        torch.set_num_threads(1)
        subject = subject_of(data, cache)
        facts["training"] = {recipe.task: recipe.seconds(cache) for recipe in (PRETRAINED, *FINE_TUNED)}
        facts["tests"] = {task: len(labels) for task, (_, labels) in zip(TASKS, subject.tests)}
        there = {own["name"]: own for own in facts["rows"]}

        def wanted(name: str) -> bool:
            return (not only or name in only) and (fresh or name not in there)

        for found in rows(subject, wanted):
            there[found["name"]] = found
            facts["rows"] = list(there.values())
            write_atomic(file, json.dumps(facts, indent=1, ensure_ascii=False).encode() + b"\n")
    write_atomic(output / "common_base.md", markdown(facts).encode())


if __name__ == "__main__":
    command(main)

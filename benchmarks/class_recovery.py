"""A network against itself moved by its full symmetry group: does matching bring it back?

For each network A (float64, random weights) an element g of every group's full class is drawn: permutations, signs,
scales, orthogonal and invertible maps. A and g(A) compute the same and their plain midpoint does not. Every method that
searches classes brings g(A) to A, which is proved (``vfx.Align``), and the midpoint is compared with A: the relative
error of its outputs, and the change of its cross-entropy on random labels, both on the inputs that activations were
read on, as these tell nothing of units that are silent there. C²M³ brings two copies at once as well, and the mean of
all three is compared. Matching permutations alone is the control. Transformers are taken as they are and lifted (norms'
gains folded, the stream centred). In front of a BatchNorm scales are left alone (statistics that are measured anew are
those of the layer as it is), so g is drawn on the folded network. ``--families`` adds the small networks on which the
tests prove symmetries (``tests/test_zoo.py``), BatchNorms folded; ``--network`` names them, too.

Results go to ``benchmarks/results``: class_recovery.json and class_recovery.md, written after each network; a run that
was stopped goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import vfx
from benchmarks.fashion import RESULTS
from benchmarks.options import Fresh, Output
from benchmarks.pairs_report import grid
from benchmarks.zoo import HUGGING_FACE, VOCABULARY, Network
from vfx.analyse.verify import randomise
from vfx.capture.outputs import named_tensors
from vfx.data import digits
from vfx.elements import act, random_element
from vfx.files import write_atomic
from vfx.models import MODELS, vit_tiny
from vfx.program import Program, run
from vfx.proof import in_double, outputs_error

LIMIT = 1e-6
SAMPLES = 64
COPIES = 3  # A, and g(A) for as many g as are left
console = Console(stderr=True)
Case = tuple[Callable[[], nn.Module], Callable[[], Any], tuple[str, ...]]  # model, inputs, forms
RowKey = tuple[str, str]  # network, form
Rows = dict[RowKey, dict[str, Any]]


class Method(NamedTuple):
    """How the edges are matched, over which classes, and how many of them."""

    match: str | None
    classes: str = "full"
    edges: int = 2


METHODS = {
    "none": Method(None),
    "weight, permutations": Method("weight", "permutation"),
    "activation, permutations": Method("activation", "permutation"),
    **{match: Method(match) for match in ("weight", "activation", "learned", "c2m3")},
    "c2m3, three": Method("c2m3", edges=COPIES),
}
FOUND = tuple(name for name, method in METHODS.items() if method.match and method.classes == "full")


def _tanh() -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(1024, 96), nn.Tanh(), nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 10)]
    return nn.Sequential(*layers)


def _images() -> Tensor:
    return digits()[0][:SAMPLES].double()


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, VOCABULARY, (SAMPLES, 12)), "attention_mask": torch.ones(SAMPLES, 12).long()}


def _text_model(name: str) -> Callable[[], nn.Module]:
    assert name in HUGGING_FACE
    return lambda: Network("huggingface", name).build()


CASES: dict[str, Case] = {
    "MLP with tanh": (_tanh, _images, ("as it is",)),
    "ResNet20-BN": (lambda: MODELS["resnet20_bn"](in_channels=1), _images, ("folded",)),
    "ViT-Tiny": (lambda: vit_tiny(in_channels=1), _images, ("as it is", "lifted")),
    "GPT-2 tiny": (_text_model("gpt2"), _tokens, ("as it is", "lifted")),
    "Llama tiny": (_text_model("llama"), _tokens, ("as it is", "lifted")),
}
FORMS: dict[str, Callable[[Program], Program]] = {
    "as it is": lambda program: program,
    "folded": lambda program: vfx.FoldNormalization(batch_norm=True)(program),
    "lifted": lambda program: vfx.CenterStream()(vfx.FoldGain()(vfx.UntieWeights()(program))),
}


def families() -> dict[str, Case]:
    """The small networks of every family that the tests go through."""
    import timm

    from tests.test_zoo import FAMILIES, HUGGING_FACE, TIMM, image

    shapes = {case.name: (case.build, case.shape) for case in FAMILIES}
    for name, (options, side, *_) in TIMM.items():
        given: dict[str, Any] = dict(options)
        shapes[name] = partial(timm.create_model, name, pretrained=False, **given), image(side)
    cases: dict[str, Case] = {
        f"{name}, small": (build, partial(_random, (SAMPLES // 4, *shape[1:])), ("folded",))
        for name, (build, shape) in shapes.items()
    }
    return cases | {
        f"{name}, small": (_text_model(name), partial(_family_inputs, name), ("as it is",)) for name in HUGGING_FACE
    }


def _random(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _family_inputs(name: str) -> Any:
    drawn = [Network("huggingface", name).inputs() for _ in range(SAMPLES // 2)]
    inputs = {key: torch.cat([draw[key] for draw in drawn]) for key in drawn[0]}
    return {key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in inputs.items()}


def copies(case: Case, form: str, seed: int) -> tuple[Program, Any]:
    """A and g(A) for several g as one Program in float64, and the inputs as the network takes them."""
    torch.manual_seed(seed)
    build, inputs, _ = case
    data = inputs()
    program = in_double(vfx.trace(build().double().eval(), data))
    example = list(program.example_inputs)
    weights = randomise(program, example, torch.Generator().manual_seed(seed))
    program = FORMS[form](program.with_weights([weights]))
    facts, generator = vfx.symmetry(program), np.random.default_rng(seed)
    moved = [act(facts, random_element(facts, generator), program.weights[0]) for _ in range(COPIES - 1)]
    return program.with_weights([program.weights[0], *moved]), data


def matched(program: Program, method: Method, data: Any) -> Program:
    """The edges aligned by a method."""
    if method.match is None:
        return program
    read = data if method.match in ("activation", "learned") else None
    return vfx.Align(method.match, read, classes=method.classes, progress=False)(program)


def measure(program: Program, method: Method, data: Any) -> dict[str, float]:
    """Error of the mean's outputs on the data that were matched on, and how much its loss differs from A's."""
    start = time.process_time()
    both = matched(program.with_weights(program.weights[: method.edges]), method, [data])
    seconds = round(time.process_time() - start, 1)
    middle = vfx.Interpolate([1 / method.edges] * method.edges)(both)
    wanted, reached = (run(p.graph, p.weights[0], list(p.example_inputs)) for p in (program, middle))
    logits = [next(iter(named_tensors(x).values())).flatten(0, -2) for x in (wanted, reached)]
    labels = torch.randint(0, logits[0].shape[-1], (len(logits[0]),), generator=torch.Generator().manual_seed(0))
    losses = [float(F.cross_entropy(x, labels)) for x in logits]
    return {"error": outputs_error(wanted, reached), "loss": abs(losses[1] - losses[0]), "seconds": seconds}


def results(cases: Mapping[str, Case], held: Rows, seed: int) -> Iterator[tuple[RowKey, dict[str, Any]]]:
    """One row a network and form of those that are not ``held``."""
    chosen = [(name, form) for name, case in cases.items() for form in case[2] if (name, form) not in held]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("recovery", total=len(chosen) * len(METHODS))
        for name, form in chosen:
            program, data = copies(cases[name], form, seed)
            facts = vfx.symmetry(program)
            kinds = dict(Counter(group.kind.title for group in facts.moving))
            row: dict[str, Any] = {"kinds": kinds, "methods": {}}
            for title, method in METHODS.items():
                progress.update(task, description=f"{name}, {form}: {title}")
                row["methods"][title] = measure(program, method, data)
                progress.advance(task)
            yield (name, form), row


def read(file: Path) -> Rows:
    """The rows that a file of results holds."""
    rows = json.loads(file.read_text()) if file.is_file() else []
    return {(row["network"], row["form"]): {name: row[name] for name in ("kinds", "methods")} for row in rows}


def in_order(rows: Rows, cases: Mapping[str, Case]) -> Rows:
    """The rows as ``cases`` name them."""
    keys = [(name, form) for name, case in cases.items() for form in case[2]]
    return {key: rows[key] for key in keys if key in rows}


def within(cell: Mapping[str, float]) -> bool:
    """Whether the mean computes what A computes."""
    return max(cell["error"], cell["loss"]) <= LIMIT


def markdown(rows: Rows) -> str:
    """A row a network: classes, the error and the loss's change for each method, and the seconds of all."""
    table = []
    for (name, form), row in rows.items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in row["kinds"].items())
        cells = [f"{cell['error']:.1e} / {cell['loss']:.1e}" for cell in row["methods"].values()]
        seconds = sum(cell["seconds"] for cell in row["methods"].values())
        table.append([name, form, kinds, *cells, f"{seconds:.0f}"])
    head = ["network", "form", "groups by class", *METHODS, "seconds"]
    text = (
        "Each cell: relative error of the mean's outputs / change of its cross-entropy; the limit is 1e-6. The seconds "
        "are processor time of all methods."
    )
    return "\n".join(
        ["# Recovery over the full classes", "", (__doc__ or "").strip(), "", text, "", *grid(head, table)]
    )


def main(
    output: Output = RESULTS,
    network: Annotated[list[str] | None, typer.Option(help="Only this network (may be repeated).")] = None,
    all_families: Annotated[bool, typer.Option("--families", help="The small networks of the tests, too.")] = False,
    fresh: Fresh = False,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of g.")] = 0,
    threads: Annotated[int, typer.Option(help="Torch's threads.")] = 1,
) -> None:
    """Match every network with itself moved by g and write the table; ends with 1 if one does not come back."""
    torch.set_num_threads(threads)
    cases = CASES | families()
    unknown = sorted(set(network or ()) - set(cases))
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is unknown; there are {', '.join(cases)}")
    output.mkdir(parents=True, exist_ok=True)
    file = output / "class_recovery.json"
    rows = {} if fresh else read(file)
    chosen = {name: cases[name] for name in network or (cases if all_families else CASES)}
    for key, row in results(chosen, rows, seed):
        rows = in_order({**rows, key: row}, cases)
        listed = [{"network": name, "form": form, **row} for (name, form), row in rows.items()]
        write_atomic(file, json.dumps(listed, indent=1) + "\n")
        write_atomic(file.with_suffix(".md"), markdown(rows) + "\n")
    missed = [f"{name}: {m}" for (name, _), row in rows.items() for m in FOUND if not within(row["methods"][m])]
    console.print(f"wrote class_recovery.json and .md; {len(missed)} beyond {LIMIT}: {', '.join(missed) or 'none'}")
    raise typer.Exit(1 if missed else 0)


if __name__ == "__main__":
    typer.run(main)

"""A network against itself moved by its full symmetry group: does matching bring it back?

For each network A (float64, random weights) an element g of every group's full class is drawn: permutations, signs,
scales, orthogonal and invertible maps. A and g(A) compute the same and their plain midpoint does not. Weight and
activation matching bring g(A) to A, which is proved (``vfx.Align``), and the midpoint is compared with A: the relative
error of its outputs, and the change of its cross-entropy on random labels. Matching permutations alone is the control.
Transformers are taken as they are and lifted (norms' gains folded, the stream centred). In front of a BatchNorm scales
are left alone (statistics that are measured anew are those of the layer as it is), so g is drawn on the folded network.

Results go to ``benchmarks/results``: class_recovery.json, class_recovery.md.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import vfx
from benchmarks.fashion import RESULTS
from benchmarks.options import Output
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
METHODS = ("none", "weight, permutations", "activation, permutations", "weight", "activation")
console = Console(stderr=True)
Case = tuple[Callable[[], nn.Module], Callable[[], Any], tuple[str, ...]]  # model, inputs, forms


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


def pair(name: str, form: str, seed: int) -> tuple[Program, list[Any]]:
    """A and g(A) as one Program in float64, and the inputs."""
    torch.manual_seed(seed)
    build, inputs, _ = CASES[name]
    data = inputs()
    program = in_double(vfx.trace(build().double().eval(), data))
    found = list(program.example_inputs)
    weights = randomise(program, found, torch.Generator().manual_seed(seed))
    program = FORMS[form](program.with_weights([weights]))
    facts = vfx.symmetry(program)
    moved = act(facts, random_element(facts, np.random.default_rng(seed)), program.weights[0])
    return program.with_weights([program.weights[0], moved]), found


def matched(program: Program, method: str, data: Any) -> Program:
    """The edges aligned by a method."""
    if method == "none":
        return program
    match, _, restricted = method.partition(", ")
    classes = "permutation" if restricted else "full"
    return vfx.Align(match, data if match == "activation" else None, classes=classes, progress=False)(program)


def measure(program: Program, method: str, data: Any, inputs: list[Any]) -> dict[str, float]:
    """Error of the midpoint's outputs, and how much its loss differs from A's."""
    both = matched(program, method, data)
    middle = vfx.Interpolate(0.5)(both)
    one, other = (run(p.graph, p.weights[0], inputs) for p in (program, middle))
    logits = [next(iter(named_tensors(x).values())).flatten(0, -2) for x in (one, other)]
    labels = torch.randint(0, logits[0].shape[-1], (len(logits[0]),), generator=torch.Generator().manual_seed(0))
    losses = [float(F.cross_entropy(x, labels)) for x in logits]
    return {"error": outputs_error(one, other), "loss": abs(losses[1] - losses[0])}


def results(only: list[str] | None, seed: int) -> Iterator[dict[str, Any]]:
    """One row a network and form."""
    chosen = [(name, form) for name in CASES if not only or name in only for form in CASES[name][2]]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("recovery", total=len(chosen) * len(METHODS))
        for name, form in chosen:
            program, inputs = pair(name, form, seed)
            facts = vfx.symmetry(program)
            kinds = dict(Counter(group.kind.title for group in facts.moving))
            row: dict[str, Any] = {"network": name, "form": form, "kinds": kinds, "methods": {}}
            for method in METHODS:
                progress.update(task, description=f"{name}, {form}: {method}")
                row["methods"][method] = measure(program, method, [CASES[name][1]()], inputs)
                progress.advance(task)
            yield row


def markdown(rows: list[dict[str, Any]]) -> str:
    """A row a network: classes, and the error and the loss's change for each method."""
    table = []
    for row in rows:
        kinds = ", ".join(f"{count} {kind}" for kind, count in row["kinds"].items())
        cells = [f"{cell['error']:.1e} / {cell['loss']:.1e}" for cell in row["methods"].values()]
        table.append([row["network"], row["form"], kinds, *cells])
    head = ["network", "form", "groups by class", *METHODS]
    text = "Each cell: relative error of the midpoint's outputs / change of its cross-entropy; the limit is 1e-6."
    return "\n".join(
        ["# Recovery over the full classes", "", (__doc__ or "").strip(), "", text, "", *grid(head, table)]
    )


def main(
    output: Output = RESULTS,
    network: Annotated[list[str] | None, typer.Option(help="Only this network (may be repeated).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of g.")] = 0,
    threads: Annotated[int, typer.Option(help="Torch's threads.")] = 1,
) -> None:
    """Match every network with itself moved by g and write the table; ends with 1 if one does not come back."""
    torch.set_num_threads(threads)
    unknown = sorted(set(network or ()) - set(CASES))
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is unknown; there are {', '.join(CASES)}")
    output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for row in results(network, seed):
        rows.append(row)
        write_atomic(output / "class_recovery.json", json.dumps(rows, indent=1) + "\n")
        write_atomic(output / "class_recovery.md", markdown(rows) + "\n")
    missed = [r for r in rows for m in ("weight", "activation") if not max(r["methods"][m].values()) <= LIMIT]
    console.print(f"wrote class_recovery.json and .md; {len(missed)} beyond {LIMIT}")
    raise typer.Exit(1 if missed else 0)


if __name__ == "__main__":
    typer.run(main)

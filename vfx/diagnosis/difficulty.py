"""EL2N: how hard each sample is for trained networks (*The Role of Data in Model Merging*; Paul et al. 2021).

EL2N(x, y) = ‖softmax f(x) − onehot y‖₂, averaged over the networks: 0 for a sample that all of them classify with
certainty, √2 for one that all of them get wrong with certainty. One pass over the data, a number kept for each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vfx.capture.exporting import structural_copy
from vfx.diagnosis.observe import first_output
from vfx.errors import ArgumentError, DataError
from vfx.program import Program
from vfx.progress import track
from vfx.statistics.labels import NAMES, check_classes

Network = Callable[[Any], Tensor]  # a raw batch as the loader gives it -> probabilities (N, C), float64


def el2n(probabilities: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Scores (N,) from each network's probabilities (N, C) and class labels (N,)."""
    classes = probabilities[0].shape[1]
    check_classes(labels, classes)
    onehot = torch.nn.functional.one_hot(labels, classes)
    return torch.stack([torch.linalg.vector_norm(p - onehot.to(p), dim=1) for p in probabilities]).mean(0)


def networks(models: Any, labelled: bool) -> list[Network]:
    """The classifiers in ``models``: a module, a Result, a Program (every weight set), or a sequence of these.

    ``labelled``: whether tuples among the batches end in labels. No model is changed.
    """
    if models is None:
        raise ArgumentError("difficulty is measured with trained networks; give models=[a, b]")
    if isinstance(models, Program):
        return [_program(models, edge, labelled) for edge in range(models.edges)]
    if isinstance(models, nn.Module):
        return [_module(structural_copy(models).eval(), labelled)]
    if hasattr(models, "program") and hasattr(models, "module"):
        return networks(models.module, labelled)
    if not isinstance(models, Iterable):
        raise ArgumentError(f"models must be networks, got {type(models).__name__}")
    models_of = [network for model in models for network in networks(model, labelled)]
    if not models_of:
        raise ArgumentError("models are empty; give the networks that measure difficulty")
    return models_of


@torch.no_grad()
def scores(
    data: Iterable[Any],
    models: Sequence[Network],
    labels: Callable[[Any, int], Tensor | None],
    pseudo: bool,
    progress: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """EL2N scores (n,) and labels (n,) of each batch; ``pseudo`` takes the ensemble's class where there is no label."""
    for raw in track(data, "difficulty", 0, progress):
        probabilities = [network(raw).cpu() for network in models]
        classes = labels(raw, len(probabilities[0]))
        if classes is None and not pseudo:
            raise DataError(
                "EL2N needs a class label for each sample and these data have none: give batches (inputs, labels), "
                "labels=, or pseudo_labels=True for the class that the models' ensemble predicts"
            )
        if classes is None:
            classes = torch.stack(probabilities).mean(0).argmax(1)
        yield el2n(probabilities, classes), classes


def _program(program: Program, edge: int, labelled: bool) -> Network:
    names = [argument.name for argument in program.signature.inputs]

    def run(raw: Any) -> Tensor:
        if isinstance(raw, Mapping):
            return _probabilities(program(edge=edge, **{name: raw[name] for name in names}))
        values = [raw] if isinstance(raw, Tensor) else list(raw)
        return _probabilities(program(*values[: len(names)], edge=edge))

    return run


def _module(model: nn.Module, labelled: bool) -> Network:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    move = lambda value: value.to(device) if isinstance(value, Tensor) else value  # noqa: E731

    def run(raw: Any) -> Tensor:
        if isinstance(raw, Mapping):
            inputs = {name: move(value) for name, value in raw.items() if name not in NAMES}
            return _probabilities(model(**inputs))
        values = [raw] if isinstance(raw, Tensor) else list(raw)
        kept = values[:-1] if labelled and len(values) > 1 else values
        return _probabilities(model(*map(move, kept)))

    return run


def _probabilities(outputs: Any) -> Tensor:
    logits = first_output(outputs)
    if logits is None or logits.ndim != 2:
        shape = None if logits is None else tuple(logits.shape)
        raise ArgumentError(f"EL2N is defined for classifiers with outputs (N, classes), this network gives {shape}")
    return logits.double().softmax(1)

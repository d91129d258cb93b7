"""``vfx.evaluate``: networks side by side on data: accuracy, loss, agreement, size and time.

All networks read each batch before the next is read, so data may be streamed. Agreement is the share of samples in
which a network decides as the first does, or as the ensemble where there is one.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import nll_loss

from vfx.analyse.cost import cost
from vfx.arguments import checked
from vfx.capture.capture import capture
from vfx.capture.signature import as_call
from vfx.diagnosis.decisions import check_labels, class_scores, log_probabilities
from vfx.diagnosis.decisions import ensemble as together
from vfx.emit.onnx_network import OnnxNetwork
from vfx.errors import ArgumentError, CaptureError
from vfx.files import csv_text
from vfx.program import Program
from vfx.progress import track
from vfx.statistics.data import Batches, reusable
from vfx.statistics.labels import PADDING
from vfx.terminal import percent, rendered
from vfx.timing import median_seconds
from vfx.wrappers import plain_model


@dataclass(frozen=True)
class Measured:
    """One network; shares between 0 and 1, ``latency`` in seconds for a batch, None where nothing was measured.

    ``nonzeros`` counts the parameters that are not zero.
    """

    name: str
    accuracy: float | None
    loss: float | None
    agreement: float | None
    params: int | None = None
    nonzeros: int | None = None
    flops: int | None = None
    latency: float | None = None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A row for each network, in the order in which they were given, the ensemble behind its members.

    ``against``: what the agreement is with; ``batch``: how many samples the time is for.
    """

    rows: tuple[Measured, ...]
    samples: int
    labelled: bool
    against: str
    batch: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        facts = {"samples": self.samples, "labels": self.labelled, "against": self.against, "batch": self.batch}
        return facts | {"notes": list(self.notes), "networks": [asdict(row) for row in self.rows]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1) + "\n"

    def to_csv(self) -> str:
        """A line for each network; a cell is empty where nothing was measured."""
        return csv_text([asdict(row) for row in self.rows])

    def __str__(self) -> str:
        """A table of at most 80 columns."""
        sparse = any((row.nonzeros or 0) < 0.99 * (row.params or 0) for row in self.rows)
        table = Table(title=f"{self.samples:,} samples; agreement with {self.against}", padding=(0, 0), pad_edge=False)
        table.add_column("network", overflow="fold", max_width=24)
        timed = f"ms/{self.batch}"
        for column in ("accuracy", "loss", "agree", "params", *(("not 0",) if sparse else ()), "FLOPs", timed):
            table.add_column(column, justify="right", no_wrap=True)
        for row in self.rows:
            sizes = (_short(row.params), *((_short(row.nonzeros),) if sparse else ()), _short(row.flops))
            latency = "" if row.latency is None else f"{1000 * row.latency:.1f}"
            loss = "" if row.loss is None else f"{row.loss:.4f}"
            table.add_row(row.name, percent(row.accuracy), loss, percent(row.agreement), *sizes, latency)
        return rendered(table, *self.notes)


@checked
def evaluate(
    models: Any,
    example_inputs: Any,
    *,
    data: Any,
    names: Sequence[str] | None = None,
    ensemble: int = 0,
    latency: bool = True,
    max_samples: int | None = None,
    device: Any = None,
    progress: bool = True,
) -> Evaluation:
    """Measure networks on ``data``: accuracy and loss against labels, agreement, parameters, FLOPs and latency.

    ``models``: a network or several (modules, Results or ``vfx.emit.onnx_network.OnnxNetwork``) that take the same
    inputs. ``ensemble``: the first so many
    give one more row together (the mean of their logits), which the agreement is then with; else it is with the first.
    ``data``: batches as for ``vfx.merge``; without labels accuracy and loss are None. ``latency``: the median of five
    runs on the first batch. Raises ArgumentError, DataError, CaptureError.

    >>> print(vfx.evaluate([a, b, merged], x, data=test_loader, names=["a", "b", "merged"], ensemble=2))
    """
    given = list(models) if isinstance(models, (list, tuple)) else [models]
    if not given or (names is not None and len(names) != len(given)):
        raise ArgumentError(
            f"evaluate takes one name for each network: {len(given)} networks, {len(names or ())} names"
        )
    if ensemble and not 2 <= ensemble <= len(given):
        raise ArgumentError(f"ensemble={ensemble} averages the first so many networks, 2 to {len(given)}")
    networks = [_Network(model, example_inputs, device) for model in given]
    first = next((network.program for network in networks if network.program is not None), None)
    if first is None:
        first = _inputs_alone(example_inputs, networks[0].refusal)
    tallies = [_Tally() for _ in range(len(networks) + bool(ensemble))]
    batches = Batches(first, reusable(data), max_samples, device)
    held = _read(networks, tallies, batches, first, ensemble, progress)
    labelled = all(tally.labelled == tally.samples for tally in tallies)
    rows = [
        tally.row(name, labelled, network, network.seconds(first, held) if latency else None)
        for name, network, tally in zip(names or [f"network {i}" for i in range(len(given))], networks, tallies)
    ]
    if ensemble:
        rows.insert(ensemble, tallies[-1].row("ensemble", labelled))
    unknown = sorted({name for network in networks if network.program is not None for name in network.unknown})
    notes = [f"FLOPs without {', '.join(unknown)}"] if unknown else []
    notes += [f"labels of the data were not used: {batches.unread}"] if batches.unread and not labelled else []
    against = "the ensemble" if ensemble else rows[0].name
    return Evaluation(tuple(rows), tallies[0].samples, labelled, against, first.batch_of(held), tuple(notes))


class _OneInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def _inputs_alone(example_inputs: Any, refusal: CaptureError) -> Program:
    """What says which inputs data hold, where no network can be captured; raises ``refusal`` for several inputs."""
    call = as_call(example_inputs)
    if len(call.args) != 1 or not isinstance(call.args[0], Tensor) or call.kwargs:
        raise refusal
    return capture(_OneInput(), call)


class _Network:
    """A network to run, with what it costs."""

    def __init__(self, model: Any, example_inputs: Any, device: Any):
        module = getattr(model, "module", model) if not isinstance(model, nn.Module) else model
        if not isinstance(module, nn.Module):
            raise ArgumentError(f"evaluate takes networks and Results, got {type(model).__name__}")
        self.module = copy.deepcopy(plain_model(module, "the network")).eval()  # the user's keeps its mode and device
        self.program: Program | None = None
        self.params = sum(x.numel() for x in self.module.parameters())
        self.nonzeros = sum(int(torch.count_nonzero(x)) for x in self.module.parameters())
        self.flops: int | None = None
        self.unknown: tuple[str, ...] = ()
        if isinstance(self.module, OnnxNetwork):
            self.refusal = CaptureError("an .onnx network is not captured; give a checkpoint beside it")
            self.params, self.nonzeros = self.module.stored, self.module.nonzeros
            return
        try:
            program = None if isinstance(model, nn.Module) else getattr(model, "program", None)
            self.program = program if isinstance(program, Program) else capture(self.module, as_call(example_inputs))
            profile = cost(self.program)
            self.flops, self.unknown = profile.flops, tuple(profile.unknown_ops)
        except CaptureError as error:  # it can be run, and is not counted
            self.refusal = error
        if device is not None:
            self.module.to(device)

    @torch.no_grad()
    def scores(self, signature: Program, batch: list[Tensor]) -> Tensor:
        call = signature.signature.call(batch)
        return class_scores(self.module(*call.args, **call.kwargs), "evaluate")

    def seconds(self, signature: Program, batch: list[Tensor]) -> float:
        call = signature.signature.call(batch)
        return median_seconds(lambda: self.module(*call.args, **call.kwargs), batch[0].device)


@dataclass
class _Tally:
    """Sums over the samples of one network."""

    samples: int = 0
    decisions: int = 0
    labelled: int = 0
    counted: int = 0
    right: int = 0
    same: int = 0
    loss: float = field(default=0.0)

    def add(self, scores: Tensor, agreed: Tensor, labels: Tensor | None) -> None:
        chosen = scores.argmax(1)
        self.samples += len(scores)
        self.decisions += chosen.numel()
        self.same += int((chosen == agreed).sum())
        if labels is not None:
            self.labelled += len(scores)
            self.counted += int((labels != PADDING).sum())
            self.right += int((chosen == labels).sum())
            self.loss += float(nll_loss(log_probabilities(scores), labels, reduction="sum", ignore_index=PADDING))

    def row(self, name: str, labelled: bool, one: _Network | None = None, seconds: float | None = None) -> Measured:
        judged = labelled and self.counted > 0
        costs = () if one is None else (one.params, one.nonzeros, one.flops, seconds)
        return Measured(
            name,
            self.right / self.counted if judged else None,
            self.loss / self.counted if judged else None,
            self.same / max(self.decisions, 1),
            *costs,
        )


def _read(
    networks: Sequence[_Network], tallies: Sequence[_Tally], batches: Batches, first: Program, ensemble: int,
    progress: bool,
) -> list[Tensor]:  # fmt: skip
    """Fill the tallies, the ensemble's last; gives the first batch."""
    held: list[Tensor] = []
    for index, (batch, labels) in enumerate(track(batches.labelled(), "evaluation", len(batches), progress)):
        held = held or batch
        outputs = [network.scores(first, batch) for network in networks]
        labels = None if labels is None else labels.to(outputs[0].device)
        if ensemble:
            outputs.append(_together(outputs[:ensemble]))
        for scores in outputs if labels is not None else ():
            check_labels(labels, scores, index)  # type: ignore[arg-type]
        agreed = outputs[-1 if ensemble else 0].argmax(1)
        for tally, scores in zip(tallies, outputs):
            if scores.argmax(1).shape != agreed.shape:
                raise ArgumentError("evaluate compares networks that decide on the same: their outputs differ in shape")
            tally.add(scores, agreed, labels)
    return held


def _together(scores: Sequence[Tensor]) -> Tensor:
    """The ensemble's log-probabilities."""
    if len({score.shape for score in scores}) > 1:
        raise ArgumentError("an ensemble takes networks of the same classes; leave ensemble= out")
    return together(scores)


def _short(count: int | None) -> str:
    """Four digits and the thousands they stand for."""
    if count is None:
        return ""
    for size, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return str(count)

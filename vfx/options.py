"""The keywords of the public calls: one dataclass for each call is their single source.

A field holds a keyword's name, default and help. The calls list them once more, as editors and readers want to see them
(``tests/test_options.py`` holds the two together); the options of the command line and the keys of recipes are made
from the fields. Nothing heavy is imported: help and wrong options are answered at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import nn

    from vfx.analyse.layers import Join
    from vfx.choice import Judging
    from vfx.combine.combiner import Combiner
    from vfx.match.matcher import Matcher
    from vfx.normalize.catalogue import Normalization
    from vfx.pruning.allocation.allocation import Allocation
    from vfx.pruning.groups import GivenScores, Loss
    from vfx.pruning.scores.score import Score
    from vfx.pruning.selection import Sparsity
    from vfx.statistics.collect import Statistics

HeadOutput = Literal["list", "cat", "mean"]  # what comes out of several edges' heads
Precision = Literal["same", "float16", "int8"]  # of the numbers in an .onnx file
DYNAMIC_BATCH: Any = "batch"  # marks that the batch varies and nothing else
REPAIRS = ("auto", "none", "repair", "rescale", "rescale_average", "reshift", "reset")  # towards a network's statistics

Kind = Literal[
    "text",
    "maybe",
    "name",
    "cut",
    "number",
    "real",
    "count",
    "numbers",
    "texts",
    "budget",
    "widths",
    "shares",
    "flag",
    "data",
    "file",
    "files",
]


class Text(NamedTuple):
    """How a keyword is written on the command line.

    ``kind``: what its text stands for (``vfx.cli.keywords.KINDS``). ``flags``: the option's names where they are not
    its own. ``names``: what it may be, beside the names in ``catalogue``, a dict or tuple (file of vfx, variable).
    """

    kind: Kind
    flags: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    catalogue: tuple[str, str] | None = None


@dataclass(frozen=True)
class Keyword:
    """A keyword of a public call: its default, its help, how it is written, and whether a recipe may hold it."""

    name: str
    default: Any
    help: str
    text: Text | None
    recipe: bool


def keyword(default: Any, help: str = "", text: Text | None = None, *, recipe: bool = True) -> Any:
    """A field of an options dataclass; ``text`` is None for what no command line can say."""
    return field(default=default, metadata={"help": help, "text": text, "recipe": recipe})


def keywords(options: type) -> dict[str, Keyword]:
    """The keywords of an options dataclass by name."""
    keywords_of = {}
    for option in fields(options):
        default = None if option.default is MISSING else option.default
        keywords_of[option.name] = Keyword(
            option.name, default, option.metadata["help"], option.metadata["text"], option.metadata["recipe"]
        )
    return keywords_of


def changed(options: Any) -> dict[str, Any]:
    """The fields of an options dataclass that are not their defaults, by name."""
    values = {option.name: (getattr(options, option.name), option.default) for option in fields(options)}
    same = lambda value, default: value is default or (isinstance(value, (int, str)) and value == default)  # noqa: E731
    return {name: value for name, (value, default) in values.items() if not same(value, default)}


def _solve() -> Any:
    help = "Solve every layer by least squares on the data: auto (what does best), least_squares, none."
    return keyword("auto", help, Text("name"))


_MATCH = Text("text", names=("auto", "none"), catalogue=("match/catalogue.py", "MATCHERS"))


def _classes() -> Any:
    help = "What weight, activation, c2m3 and learned matching find: full or permutation."
    return keyword("full", help, Text("text"))


def _restarts() -> Any:
    return keyword(0, "Further runs of weight, activation, c2m3 or ste.", Text("number"))


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What every call that reads data takes."""

    data: Any = keyword(None, "Calibration inputs: {data}", Text("data", ("--data", "-d")), recipe=False)
    max_samples: int | None = keyword(None, "Use at most this many calibration samples.", Text("count"))
    verify: bool = keyword(True, "Prove each step numerically before it is used.", Text("flag"))
    seed: int = keyword(0, "Seed of everything random.", Text("number"))
    progress: bool = keyword(True, recipe=False)

    @property
    def reading(self) -> dict[str, Any]:
        """The keywords of whatever runs a network on data."""
        return {"max_samples": self.max_samples, "device": getattr(self, "device", None), "progress": self.progress}


@dataclass(frozen=True, kw_only=True)
class Rewriting(Reading):
    """What merging and pruning share."""

    solve: str | None = _solve()
    judge: Judging = keyword(
        "auto", "What outputs are: auto, logits, probabilities, embedding, multilabel, regression.", Text("text")
    )
    normalize: str | Normalization | None = keyword("auto", text=Text("name", names=REPAIRS))
    dynamic_shapes: Any = keyword(DYNAMIC_BATCH)
    outputs: Sequence[int | str] | None = keyword(
        None,
        "Outputs that count, by key, index or path (logits, 0, states[2]); repeatable; default: all.",
        Text("texts"),
    )
    device: Any = keyword(None, "cpu, cuda, mps, …", Text("maybe"))
    checkpoint: str | os.PathLike[str] | None = keyword(
        None, "Folder that keeps what is finished: the same command, started again, goes on from it.", Text("maybe"),
        recipe=False,
    )  # fmt: skip

    @property
    def capturing(self) -> dict[str, Any]:
        """The keywords of the capture."""
        return {"dynamic_shapes": self.dynamic_shapes, "outputs": self.outputs}


@dataclass(frozen=True, kw_only=True)
class MergeOptions(Rewriting):
    """The keywords of ``vfx.merge``."""

    match: str | Matcher | None = keyword("auto", text=_MATCH)
    classes: str = _classes()
    restarts: int = _restarts()
    weights: float | Sequence[float] | None = keyword(None, "One weight for each edge, e.g. 0.3,0.7.", Text("numbers"))
    combine: str | Combiner = keyword(
        "average", text=Text("text", names=("average",), catalogue=("combine/catalogue.py", "COMBINERS"))
    )
    base: Any = keyword(None, "Checkpoint that all edges were fine-tuned from.", Text("file"))
    follow: int | str = keyword(
        "auto", "First layers that follow one edge: auto, a number, or a module's name.", Text("cut")
    )
    follow_edge: int | str = keyword("auto", "The edge that they follow: auto, or its number from 0.", Text("cut"))
    normalize: str | Normalization | None = keyword(
        "auto", text=Text("text", names=("auto", "none"), catalogue=("normalize/catalogue.py", "METHODS"))
    )
    preserve: int | str = keyword(0, "First layers kept for each edge: a number, or a module's name.", Text("cut"))
    budget: Mapping[str, float] | None = keyword(None)
    join: Join = keyword("preactivation", "preactivation or activation.", Text("text"))
    heads: int | str = keyword(0, "Last layers kept for each edge: a number, or a module's name.", Text("cut"))
    head_output: HeadOutput = keyword("list", "Outputs of the heads: list, cat or mean.", Text("text"))
    prepare: str | None = keyword(None, "Before matching: none, lift, balance, or remove_bias.", Text("name"))
    references: Sequence[nn.Module] = keyword(
        (), "Networks whose statistics are the goal, repeatable.", Text("files", ("--reference",))
    )
    statistics: Statistics | None = keyword(None, recipe=False)
    held_out: Any = keyword(None)

    @property
    def keeping(self) -> dict[str, Any]:
        """The layers that each edge keeps for itself: keywords of Align."""
        return {"heads": self.heads, "preserve": 0 if self.budget is not None else self.preserve, "join": self.join}


@dataclass(frozen=True, kw_only=True)
class PruneOptions(Rewriting):
    """The keywords of ``vfx.prune``."""

    sparsity: Sparsity = keyword(
        None,
        "Share of the weights that go, or glob=share for layers; repeatable.",
        Text("shares", ("--sparsity", "-s")),
    )
    score: str | Score = keyword(
        "auto", text=Text("text", names=("auto",), catalogue=("pruning/scores/catalogue.py", "SCORES"))
    )
    scores: str | os.PathLike[str] | None = keyword(
        None, "File of scores (.safetensors): read where it is there, else written.", Text("maybe")
    )
    scope: str = keyword("auto", "auto, global, layer, row, or a pattern: 2:4, transposable 2:4.", Text("text"))
    allocation: str | Allocation = keyword(
        "auto", text=Text("text", names=("auto", "scope"), catalogue=("pruning/allocation/catalogue.py", "ALLOCATIONS"))
    )
    repair_samples: int = keyword(64, "Samples that the repair reads.", Text("number"))
    protect: str | Sequence[str] = keyword(
        "auto", "Layers left alone: auto, none, first, head or a glob; repeatable.", Text("texts")
    )
    steps: int = keyword(1, "One-shot steps, scores taken anew in each.", Text("number"))
    schedule: str = keyword("cubic", "How the sparsity grows with the steps: cubic or linear.", Text("text"))
    masks: str = keyword("permanent", "permanent, parametrize or semi_structured (2:4 on CUDA).", Text("text"))
    structured: Mapping[str, Any] | None = keyword(None)


@dataclass(frozen=True, kw_only=True)
class StructuredOptions(Rewriting):
    """The keywords of ``vfx.prune_structured``."""

    sparsity: float | Sequence[float] | None = keyword(
        None,
        "Share of the channels of each group that goes; several, as in 0.25,0.5, give files for each: small-0.25.onnx.",
        Text("widths", ("--sparsity", "-s")),
    )
    method: str = keyword("remove", "remove, or fold: merge channels by k-means.", Text("text"))
    score: str | GivenScores = keyword(
        "auto", text=Text("text", names=("auto",), catalogue=("pruning/groups.py", "METHODS"))
    )
    basis: str = keyword(
        "auto", "Where channels mix freely (heads): principal turns them first, given does not; or auto.", Text("text")
    )
    allocation: str = keyword(
        "auto", text=Text("text", names=("auto",), catalogue=("pruning/widths.py", "ALLOCATIONS"))
    )
    budget: Mapping[str, float] | None = keyword(
        None, "What is left instead, e.g. flops=0.5: params, flops or latency.", Text("budget")
    )
    round_to: int = keyword(1, "Kept widths are multiples of it.", Text("number"))
    units: str = keyword(
        "auto",
        "What goes in heads and groups: channels, blocks, both, auto; or experts, or layers (residual blocks).",
        Text("text"),
    )
    experts: str = keyword(
        "remove", "With units experts: remove those that go, or merge each into the nearest left.", Text("text")
    )
    roles: Sequence[str] = keyword(
        (), "Kinds of groups that may go: streams, hidden, blocks; repeatable; default: all.", Text("texts")
    )
    protect: Sequence[str] = keyword((), "Weight whose groups stay whole; repeatable.", Text("texts"))
    variance: bool = keyword(True)
    loss: Loss | None = keyword(None)
    repair_samples: int = keyword(64, "Samples that the repair reads.", Text("number"))


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The keywords of ``vfx.export`` that say what an ``.onnx`` file is."""

    opset: int = keyword(20, "Opset of .onnx, 18 or more.", Text("number"))
    precision: Precision = keyword(
        "same", "Numbers in .onnx: same (as the network's), float16, or int8 (needs --data).", Text("text")
    )
    input_names: Sequence[str] | None = keyword(
        None, "Name of an input of .onnx, in forward's order; repeatable.", Text("texts", ("--input-name",))
    )
    output_names: Sequence[str] | None = keyword(
        None, "Name of an output of .onnx, in their order; repeatable.", Text("texts", ("--output-name",))
    )
    axis_names: Sequence[str] | None = keyword(
        None,
        "Name of an axis whose size .onnx leaves open, as the inputs show them; repeatable; default: batch.",
        Text("texts", ("--axis-name",)),
    )
    data: Any = keyword(None, "Inputs that calibrate int8: {data}", Text("data", ("--data", "-d")))
    max_samples: int | None = keyword(None, "Use at most this many calibration samples.", Text("count"))


@dataclass(frozen=True, kw_only=True)
class RepairOptions(Reading):
    """The keywords of ``vfx.repair``."""

    solve: str | None = _solve()
    method: str | Normalization = keyword(
        "auto", "auto, repair, rescale, rescale_average, reshift or reset.",
        Text("text", names=("auto", "none"), catalogue=("normalize/catalogue.py", "METHODS")),
    )  # fmt: skip
    goals: Statistics | None = keyword(None)
    match: str | Matcher | None = keyword(None, "Align the references first: none, weight or activation.", Text("name"))
    weights: float | Sequence[float] | None = keyword(None)


@dataclass(frozen=True, kw_only=True)
class TransferOptions(Reading):
    """The keywords of ``vfx.transfer``."""

    difference: bool = keyword(False, "TUNED holds the change itself instead of the network.", Text("flag"))
    scale: float = keyword(1.0, "How much of the change is added.", Text("real"))
    match: str | Matcher | None = keyword("auto", text=_MATCH)
    classes: str = _classes()
    restarts: int = _restarts()

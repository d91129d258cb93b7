"""Channels removed by vfx's default call and by Torch-Pruning, at equal parameters, with and without our repair.

The first networks of the four Fashion-MNIST pairs, and those of ``benchmarks.transformers`` (a ViT for the same images,
a GPT-2 for characters), lose 25, 50 and 75 % of the channels by ``vfx.prune_structured`` as it stands, calibrated on
the first 1,000 training images (256 windows of 64 characters) without labels: of every group, or those with the lowest
scores wherever they are ("global"), at no more parameters, where held-out samples among them say so. Torch-Pruning
removes channels by the L2 norm of a group, by Taylor (the gradient of the loss on 256 of these samples, with labels),
and by both over isomorphic groups at once (Fang et al., ECCV 2024): the same share where that leaves at most 5 % more
parameters than our default, else as many as leave no more. In attention it removes dimensions of all heads ("dims") or
whole heads ("heads"); two of its faults are mended for it: smaller heads keep the scale of the dense logits, LayerNorms
the order of their parameters. "Our repair" removes the same channels by vfx and solves all layers for the dense
network's outputs on these samples. Accuracy is over the test samples; the standard error of the difference to our
default is that of the labels on which the two disagree. Nothing is trained. A cell is empty where a peer leaves an
attention without heads.

``torch-pruning`` must be installed. Results go to ``benchmarks/results``: channel_peers.json and channel_peers.md,
written after each share of a network; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from vfx.passes.reconstruct import Reconstruct

from benchmarks.fashion import CHECKPOINTS, FASHION_MNIST, RESULTS, MissingData, command
from benchmarks.masks import Sources
from benchmarks.options import Cache, Checkpoints, DataFolder, Fresh, Output, Samples
from benchmarks.pairs_report import grid
from vfx.analyse.symmetry import Symmetry, symmetry
from vfx.api import prune_structured, trace
from vfx.api.results import Result
from vfx.emit.module import graph_module
from vfx.files import write_atomic
from vfx.models.training import predict
from vfx.models.vit import Attention
from vfx.program import Program
from vfx.reconstruct.references import Reference
from vfx.resize import resize
from vfx.resize.channels import KeptChannels

NETWORKS = ("resnet20_bn_w05", "vgg16_bn_w025", "vgg16_w025", "vgg16_bn_w05", "vit_fashion", "gpt_text")
SHARES = (0.25, 0.5, 0.75)
CALIBRATION, LABELLED, BATCH, TEST_BATCH = 1000, 256, 100, 250
ROUNDING = 1.05  # times our parameters may a peer keep that removes the plain share: whole channels go
HALVINGS = 12  # of the interval that holds a peer's ratio
CLOSE = 1e-3  # by which the peer's module and ours without the same channels may differ, of the outputs' largest
OURS = "vfx, default"
REPAIRED = "{}, our repair"


@dataclass(frozen=True)
class Peer:
    """How Torch-Pruning scores, whether it ranks all isomorphic groups together, and what goes in attention."""

    importance: str
    isomorphic: bool
    attention: str | None = None  # "dims" of all heads, whole "heads"


_SCORED = {
    "L2": Peer("MagnitudeImportance", False),
    "Taylor": Peer("TaylorImportance", False),
    "isomorphic, L2": Peer("MagnitudeImportance", True),
    "isomorphic, Taylor": Peer("TaylorImportance", True),
}
PEERS = _SCORED | {
    f"{name}, {what}": replace(peer, attention=what) for name, peer in _SCORED.items() for what in ("dims", "heads")
}
METHODS = (OURS, *(name for peer in PEERS for name in (peer, REPAIRED.format(peer))))
Pruned = tuple[nn.Module, dict[str, set[int]]]  # a network, and the output channels that went by their layer's name
console = Console(stderr=True)


@dataclass(frozen=True, eq=False)
class Subject:
    """A trained network, as a Program too, with what it is calibrated and measured on."""

    model: nn.Module
    program: Program
    train: Tensor
    train_labels: Tensor
    inputs: Tensor
    labels: Tensor

    def right(self, module: nn.Module) -> Tensor:
        """Whether each test label is given rightly."""
        return predict(module, self.inputs, TEST_BATCH).argmax(-1) == self.labels

    @property
    def peers(self) -> dict[str, Peer]:
        """Those that treat attention in some way where there is any."""
        attends = bool(_attentions(self.model))
        return {name: peer for name, peer in PEERS.items() if (peer.attention is not None) == attends}


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# the peer -------------------------------------------------------------------------------------------------------------


def _attentions(module: nn.Module) -> list[Attention]:
    return [m for m in module.modules() if isinstance(m, Attention)]


def peer_pruned(subject: Subject, peer: Peer, ratio: float) -> Pruned | None:
    """Torch-Pruning's network, unless an attention lost all of its heads."""
    library: Any = import_module("torch_pruning")
    model = copy.deepcopy(subject.model).eval()
    attentions = _attentions(model)
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    pruner = library.pruner.BasePruner(
        model,
        subject.train[:2],
        importance=getattr(library.importance, peer.importance)(),
        pruning_ratio=ratio,
        global_pruning=peer.isomorphic,
        isomorphic=peer.isomorphic,
        ignored_layers=[head],
        num_heads={attention.qkv: attention.heads for attention in attentions},
        prune_num_heads=peer.attention == "heads",
        prune_head_dims=peer.attention != "heads",
        head_pruning_ratio=ratio if peer.attention == "heads" else 0.0,
    )
    dims = [attention.proj.in_features // attention.heads for attention in attentions]
    inputs, labels = subject.train[:LABELLED], subject.train_labels[:LABELLED]
    nn.functional.cross_entropy(model(inputs).flatten(0, -2), labels.flatten()).backward()
    gone: dict[str, set[int]] = {}
    names = {module: name for name, module in model.named_modules()}
    for group in pruner.step(interactive=True):
        for dependency, channels in group:
            if pruner.DG.is_out_channel_pruning_fn(dependency.handler) and dependency.target.module in names:
                gone.setdefault(names[dependency.target.module], set()).update(channels)
        group.prune()
    if not all(pruner.num_heads[attention.qkv] for attention in attentions):
        return None
    for attention, before in zip(attentions, dims):
        attention.heads = pruner.num_heads[attention.qkv]
        _keep_scale(attention, before)
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            _in_order(module, cast(nn.LayerNorm, subject.model.get_submodule(name)), gone.get(name, set()))
    return model, gone


@torch.no_grad()
def _keep_scale(attention: Attention, dims: int) -> None:
    """Attention divides by the root of a head's size, which was ``dims``: its queries make up for that."""
    width = attention.proj.in_features
    for tensor in (attention.qkv.weight, attention.qkv.bias):
        tensor[:width] *= math.sqrt(width / attention.heads / dims)


@torch.no_grad()
def _in_order(norm: nn.LayerNorm, dense: nn.LayerNorm, gone: set[int]) -> None:
    """Torch-Pruning 1.6.1 leaves a LayerNorm's parameters in the order of a Python set."""
    kept = [channel for channel in range(len(dense.weight)) if channel not in gone]
    norm.weight.copy_(dense.weight[kept])
    norm.bias.copy_(dense.bias[kept])


def fitted(subject: Subject, peer: Peer, share: float, limit: int) -> Pruned | None:
    """A peer's network without the plain share where that fits, else the largest with at most ``limit`` parameters."""
    pruned = peer_pruned(subject, peer, share)
    if pruned and limit <= parameters(pruned[0]) <= ROUNDING * limit:
        return pruned
    low, high, best = 0.0, 1.0, None
    for _ in range(HALVINGS):
        ratio = (low + high) / 2
        pruned = peer_pruned(subject, peer, ratio)
        if pruned and parameters(pruned[0]) > limit:
            low = ratio
        else:
            high, best = ratio, pruned or best
    return best


def kept_channels(facts: Symmetry, gone: Mapping[str, set[int]]) -> dict[int, np.ndarray]:
    """The channels of each group that a peer left."""
    kept = {}
    for group in facts.groups:
        lost: set[int] = set()
        for member in group.members:
            name, _, tensor = member.fqn.rpartition(".")
            if tensor == "weight" and member.role == "out" and name in gone:
                lost |= {c for c, places in enumerate(member.position) if set(places.tolist()) <= gone[name]}
        kept[group.index] = np.setdiff1d(np.arange(group.size), sorted(lost))
    return kept


def repaired(subject: Subject, module: nn.Module, gone: Mapping[str, set[int]]) -> nn.Module:
    """The dense network without a peer's channels, solved; before that it must be the peer's network."""
    facts = symmetry(subject.program)
    small = resize(subject.program, facts, kept_channels(facts, gone))
    wanted, given = (predict(m, subject.inputs[:50], 50) for m in (module, graph_module(small.program)))
    if not bool((given - wanted).abs().max() <= CLOSE * wanted.abs().max()):
        raise RuntimeError("the network without the peer's channels is not the peer's network")
    reference = Reference(subject.program, 1.0, KeptChannels(small, facts))
    solved = Reconstruct([reference], subject.train.split(BATCH), progress=False).run(small.program).program
    return graph_module(solved)


# measuring ------------------------------------------------------------------------------------------------------------


def measured(subject: Subject, share: float) -> dict[str, Any]:
    """Every method at one share of channels."""
    cells: dict[str, Any] = {}
    rights: dict[str, Tensor] = {}

    def cell(name: str, make: Callable[[], nn.Module]) -> nn.Module:
        start = time.process_time()
        module = make()
        seconds = round(time.process_time() - start, 1)
        rights[name] = subject.right(module)
        mine, theirs = rights[OURS], rights[name]
        cells[name] = {
            "accuracy": round(100 * float(theirs.double().mean()), 2),
            "parameters": parameters(module),
            "seconds": seconds,
            "ours_alone_right": int((mine & ~theirs).sum()),
            "peer_alone_right": int((theirs & ~mine).sum()),
        }
        console.print(name, cells[name])
        return module

    results: list[Result] = []

    def by_default() -> nn.Module:
        batches = subject.train.split(BATCH)
        results.append(prune_structured(subject.program, sparsity=share, data=batches, progress=False))
        return results[0].module

    ours = cell(OURS, by_default)
    cells[OURS]["allocation"] = results[0].report.choices["allocation"]
    for name, peer in subject.peers.items():
        left = fitted(subject, peer, share, parameters(ours))
        if left is None:
            continue
        pruned, gone = left
        cell(name, lambda pruned=pruned: pruned)  # type: ignore[misc]
        cell(REPAIRED.format(name), lambda pruned=pruned, gone=gone: repaired(subject, pruned, gone))  # type: ignore[misc]
    return cells


def subject_of(name: str, sources: Sources) -> Subject:
    trained = sources(name)
    train, labels = trained.calibration[:CALIBRATION], trained.calibration_labels[:CALIBRATION]
    return Subject(trained.model, trace(trained.model, train[:2]), train, labels, trained.inputs, trained.labels)


# results --------------------------------------------------------------------------------------------------------------


def lead(cell: Mapping[str, Any], labels: int) -> tuple[float, float]:
    """By how many points our default is ahead, and the standard error of that over the labels."""
    mine, theirs = cell["ours_alone_right"], cell["peer_alone_right"]
    ahead = (mine - theirs) / labels
    return 100 * ahead, 100 * math.sqrt(max((mine + theirs) / labels - ahead**2, 0) / labels)


def shown(method: str, cell: Mapping[str, Any], labels: int) -> str:
    """The accuracy, and by how much our default is ahead of a peer, ± the standard error."""
    if method == OURS:
        return f"{cell['accuracy']:.2f}" + (", global" if cell["allocation"] == "global" else "")
    ahead, error = lead(cell, labels)
    return f"{cell['accuracy']:.2f} ({ahead:+.2f} ± {error:.2f})"


def markdown(results: dict[str, Any]) -> str:
    """A table of all networks; in brackets by how much our default is ahead."""
    lines = ["# Channels: Torch-Pruning and vfx", "", (__doc__ or "").split("\n\n")[1].replace("\n", " "), ""]
    rows = []
    for name, result in results.items():
        measured = [method for method in METHODS if any(method in share for share in result["shares"].values())]
        for number, method in enumerate(measured):
            title = f"{name} ({result['dense']:.2f})" if not number else ""
            cells = [result["shares"].get(str(share), {}).get(method) for share in SHARES]
            sizes = ", ".join(f"{cell['parameters'] / result['parameters']:.3f}×" for cell in cells if cell)
            rows.append([title, method, *(shown(method, c, result["labels"]) if c else "" for c in cells), sizes])
    head = ["network", "method", *(f"{100 * share:g} % of channels" for share in SHARES), "parameters"]
    return "\n".join([*lines, *grid(head, rows), "", versions(results), ""])


def versions(results: dict[str, Any]) -> str:
    return "torch-pruning " + ", ".join(sorted({result["torch_pruning"] for result in results.values()})) + "."


def begin(threads: int) -> None:
    """Set torch's threads, if any are named. Raises MissingData without Torch-Pruning."""
    try:
        import_module("torch_pruning")
    except ImportError as error:
        raise MissingData("install torch-pruning") from error
    if threads:
        torch.set_num_threads(threads)


def main(
    checkpoints: Checkpoints = CHECKPOINTS,
    data: DataFolder = FASHION_MNIST,
    cache: Cache = Path("demo"),
    output: Output = RESULTS,
    pair: Annotated[list[str] | None, typer.Option(help="Only this network (may be repeated).")] = None,
    share: Annotated[list[float] | None, typer.Option(help="Only this share of channels (may be repeated).")] = None,
    samples: Samples = None,
    fresh: Fresh = False,
    threads: Annotated[int, typer.Option(help="Torch's threads; 0 leaves its choice.")] = 0,
) -> None:
    """Remove channels by every method and write channel_peers.json and channel_peers.md."""
    begin(threads)
    output.mkdir(parents=True, exist_ok=True)
    file = output / "channel_peers.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() and not fresh else {}
    for name in pair or NETWORKS:
        subject = subject_of(name, Sources(checkpoints, data, cache, samples))
        dense = round(100 * float(subject.right(subject.model).double().mean()), 2)
        result = results.setdefault(name, {"shares": {}})
        result |= {"dense": dense, "labels": subject.labels.numel(), "parameters": parameters(subject.model)}
        result["torch_pruning"] = version("torch-pruning")
        for part in share or SHARES:
            if str(part) not in result["shares"]:
                console.print(name, part)
                result["shares"][str(part)] = measured(subject, part)
                write_atomic(file, json.dumps(results, indent=1) + "\n")
                write_atomic(file.with_suffix(".md"), markdown(results))


if __name__ == "__main__":
    command(main)

"""Which weights go: scores and allocations over layers, all of them solved alike within their masks.

The first networks of the four Fashion-MNIST pairs, calibrated on the first 2,000 training images without labels, and
those of ``benchmarks.transformers``: a ViT (the same images) and a GPT-2 (256 windows of 64 characters; accuracy of the
next one). Accuracy is over the test samples; nothing is trained. "x, y, z" is a score, its scope, and an allocation of
the sparsity over layers; where none is named the scope alone decides. "No repair" is a score in its paper's scope with
its own updates alone (SparseGPT has some). The last layer keeps all weights but for magnitude, where it is pruned with
the others; "head kept" and "head too" are the controls. A whole last layer adds to the weights that are left; with
"same size" the other layers lose as many more. "default" is ``vfx.prune`` as it stands: ALPS, and ERK with the last
layer whole where it holds at most a quarter of what is left; it loses as many weights as global magnitude. Patterns
leave the first layer whole, too: it has one input. Behind all other masks the layers are solved for the dense network's
outputs.

Results go to ``benchmarks/results``: supports.json and supports.md, written after each cell; a run that was stopped
goes on where it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.fashion import CHECKPOINTS, FASHION_MNIST, RESULTS, command
from benchmarks.masks import SAME_SIZE, Sources, Sweep
from benchmarks.options import Cache, Checkpoints, DataFolder, Fresh, Output, Samples

NETWORKS = ("resnet20_bn_w05", "vgg16_bn_w025", "vgg16_w025", "vgg16_bn_w05", "vit_fashion", "gpt_text")
SHARES = ("2:4", 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)


def _way(score: str, scope: str, allocation: str = "scope", protect: str | tuple[str, ...] = "head") -> dict[str, Any]:
    return {"score": score, "scope": scope, "allocation": allocation, "protect": protect, "solve": "least_squares"}


def _bare(score: str) -> dict[str, Any]:
    return {"score": score, "solve": None, "normalize": None}


METHODS = {
    "magnitude, no repair": _bare("magnitude"),
    "wanda, no repair": _bare("wanda"),
    "sparsegpt, no repair": _bare("sparsegpt"),
    "magnitude, global": _way("magnitude", "global", protect="auto"),
    "magnitude, global, head kept": _way("magnitude", "global"),
    "magnitude, layer": _way("magnitude", "layer"),
    "magnitude, layer, erk": _way("magnitude", "layer", "erk"),
    "magnitude, layer, error": _way("magnitude", "layer", "error"),
    "wanda, row": _way("wanda", "row"),
    "wanda, row, same size": _way("wanda", "row") | {SAME_SIZE: True},
    "wanda, row, owl": _way("wanda", "row", "owl"),
    "wanda, layer, error": _way("wanda", "layer", "error"),
    "mixed, layer": _way("mixed", "layer"),
    "sparsegpt, layer": _way("sparsegpt", "layer"),
    "sparsegpt, layer, same size": _way("sparsegpt", "layer") | {SAME_SIZE: True},
    "sparsegpt, layer, error": _way("sparsegpt", "layer", "error"),
    "alps, layer": _way("alps", "layer"),
    "alps, layer, progressive": _way("alps", "layer", "progressive"),
    "alps, layer, erk": _way("alps", "layer", "erk"),
    "alps, layer, erk, head too": _way("alps", "layer", "erk", protect=()),
    "default": {"solve": "least_squares"},
    "alps, layer, error": _way("alps", "layer", "error"),
}
PREFACE = (__doc__ or "").split("\n\n")[1].replace("\n", " ")
SWEEP = Sweep("supports", "Supports and allocations", PREFACE, METHODS, SHARES)


def main(
    checkpoints: Checkpoints = CHECKPOINTS,
    data: DataFolder = FASHION_MNIST,
    cache: Cache = Path("demo"),
    output: Output = RESULTS,
    pair: Annotated[list[str] | None, typer.Option(help="Only this network (may be repeated).")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only this row (may be repeated).")] = None,
    share: Annotated[list[str] | None, typer.Option(help="Only this column, 0.9 or 2:4 (may be repeated).")] = None,
    samples: Samples = None,
    fresh: Fresh = False,
    threads: Annotated[int, typer.Option(help="Torch's threads; 0 leaves its choice.")] = 0,
) -> None:
    """Prune the networks by every score and allocation and write supports.json and supports.md."""
    if threads:
        torch.set_num_threads(threads)
    SWEEP(pair or NETWORKS, Sources(checkpoints, data, cache, samples), output, fresh, method, share)


if __name__ == "__main__":
    command(main)

"""``vfx.prune`` and ``vfx.prune_structured``: single weights, or whole channels, go in one shot."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from vfx.api.dense import capture_dense
from vfx.api.elastic import prune_family
from vfx.api.masking import masked, masked_result, masking, with_support
from vfx.api.removing import removed, removed_result, share_of, whole_channels
from vfx.api.restoring import decide
from vfx.api.results import Result
from vfx.arguments import checked
from vfx.checkpointing.resuming import resumable
from vfx.choice import Judging
from vfx.normalize.catalogue import Normalization
from vfx.options import DYNAMIC_BATCH, PruneOptions, StructuredOptions
from vfx.program import Program
from vfx.pruning.allocation.allocation import Allocation
from vfx.pruning.groups import GivenScores, Loss
from vfx.pruning.scores.score import Score
from vfx.pruning.selection import Sparsity
from vfx.report import Stopwatch
from vfx.statistics.data import reusable


@checked
def prune(
    model: nn.Module | Program,
    example_inputs: Any = None,
    *,
    sparsity: Sparsity = None,
    score: str | Score = "auto",
    scores: str | os.PathLike[str] | None = None,
    scope: str = "auto",
    allocation: str | Allocation = "auto",
    data: Any = None,
    max_samples: int | None = None,
    repair_samples: int = 64,
    protect: str | Sequence[str] = "auto",
    solve: str | None = "auto",
    judge: Judging = "auto",
    normalize: str | Normalization | None = "auto",
    steps: int = 1,
    schedule: str = "cubic",
    masks: str = "permanent",
    structured: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = DYNAMIC_BATCH,
    outputs: Sequence[int | str] | None = None,
    verify: bool = True,
    seed: int = 0,
    device: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Result:
    """Set the weights that a trained network needs least to zero and solve those that stay, without training.

    ``sparsity``: the share of the convolution and linear weights that go, or a dict of globs of layers. ``score``:
    "magnitude", "random", "fisher", "woodfisher", "wanda", "gradient", "mixed", "sparsegpt", "alps", or a Score; "auto"
    is ALPS with data, unless a layer is too wide for it or the scope is "global", else magnitude. ``scores``: a
    .safetensors file of scores, read where it is there (whatever data are given) and written where it is not.
    ``scope``: "global", "layer", "row", a pattern such as "2:4" ("transposable 2:4" runs along the outputs, too), or
    "auto" (the score's own: rows for Wanda, layers for SparseGPT and ALPS, else global).
    ``allocation``: how the share is spread over layers in the scopes "layer" and "row": "scope" (evenly),
    "progressive", "erk" (Erdős–Rényi), "owl" (outliers), "error" (measured errors of the layers); "auto" is "erk" where
    score and scope are left to "auto" and ALPS is taken, else "scope".
    ``data``: batches as for ``merge``; labels behind the inputs serve the gradients. ``max_samples`` bounds what the
    score and the solution read, ``repair_samples`` what a normalization reads. ``protect``: layers that keep all
    weights: globs, "first", "head"; "auto" is the head where Wanda, SparseGPT or ALPS are named.
    ``solve``: "least_squares" solves each layer, within its mask, for the dense network's outputs on ``data``
    (``vfx.Reconstruct``); "auto" does that, normalizes, or both, whatever does best on held-out samples (as ``judge``
    sees them, see ``merge``), and gives way to a normalization that is named; None does not solve. ``normalize``: None,
    "repair", "rescale", "reset", towards the dense network's statistics; "auto" is RESET with BatchNorm, else REPAIR,
    and None without data. ``steps`` one-shot steps along a "cubic" or "linear" ``schedule``. ``masks``: "permanent"
    zeros, "parametrize" for fine-tuning, or "semi_structured" 2:4 tensors on CUDA. ``scope="group"`` (or
    ``structured``, its further options) removes whole channels instead: see ``prune_structured``. ``dynamic_shapes``
    and ``outputs`` (those that count): as for ``vfx.trace``. ``checkpoint``: a folder that keeps each layer that is
    pruned, solved or normalized: the same call, made again, goes on behind the last one (``vfx/checkpointing``).
    *Vanishing Feature* §5.5, App. A.7.
    Example: ``vfx.prune(model, x, sparsity=0.9, score="wanda", scores="wanda.safetensors", data=loader)``.
    Raises ArgumentError, WeightError, DataError, CaptureError, CheckpointError, OutputError, PassError,
    VerificationError.
    """
    options = PruneOptions(
        sparsity=sparsity, score=score, scores=scores, scope=scope, allocation=allocation, data=reusable(data),
        max_samples=max_samples, repair_samples=repair_samples, protect=protect, solve=solve, judge=judge,
        normalize=normalize, steps=steps, schedule=schedule, masks=masks, structured=structured,
        dynamic_shapes=dynamic_shapes, outputs=outputs, verify=verify, seed=seed, device=device, checkpoint=checkpoint,
        progress=progress,
    )  # fmt: skip
    if scope == "group" or structured is not None:
        return prune_structured(model, example_inputs, **whole_channels(options, prune_structured))
    with resumable(options, model, example_inputs):
        return _pruned(model, example_inputs, options)


def _pruned(model: nn.Module | Program, example_inputs: Any, options: PruneOptions) -> Result:
    """The stages of ``prune``."""
    watch = Stopwatch(options.progress)
    masking(with_support(options))  # what is wrong with them is said before anything takes time
    dense = capture_dense(model, example_inputs, options, watch)
    mask = masking(with_support(options, dense.program))
    restoring = masked(dense, mask, options, watch)
    decision = decide({"": restoring}, dense.solved, watch)
    restored = restoring(decision.way, watch)
    return masked_result(mask, restoring, restored, decision, options, watch)


@checked
def prune_structured(
    model: nn.Module | Program,
    example_inputs: Any = None,
    *,
    sparsity: float | Sequence[float] | None = None,
    method: str = "remove",
    score: str | GivenScores = "auto",
    basis: str = "auto",
    allocation: str = "auto",
    budget: Mapping[str, float] | None = None,
    round_to: int = 1,
    units: str = "auto",
    experts: str = "remove",
    roles: Sequence[str] = (),
    protect: Sequence[str] = (),
    variance: bool = True,
    data: Any = None,
    solve: str | None = "auto",
    judge: Judging = "auto",
    loss: Loss | None = None,
    max_samples: int | None = None,
    repair_samples: int = 64,
    normalize: str | Normalization | None = "auto",
    dynamic_shapes: Any = DYNAMIC_BATCH,
    outputs: Sequence[int | str] | None = None,
    verify: bool = True,
    seed: int = 0,
    device: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Result:
    """Remove whole channels, heads or groups along the symmetry groups: a smaller network of any architecture.

    ``sparsity``: the share of the channels of each group that goes, or several shares for a ``WidthFamily`` of
    networks, each one's channels among those of the wider ones, from one ordering by the score that does best at the
    middle share; or ``budget``: what is left of one figure of the network, {"params": 0.5}, {"flops": 0.5} or
    {"latency": 0.5}.
    ``method``: "remove", or "fold" (k-means over channels, merged by role; Wang et al., ICLR 2025). ``score``:
    "magnitude" (l2), "l1", "taylor", "activation", "obs" (what the layers behind lose when the channels left make up
    for one that goes; Optimal Brain Surgeon by channels), "random", or scores by group index, each of ``group.shape``;
    "auto" is magnitude, or with data activation where it leaves a clearly better network on held-out samples (as
    ``judge`` sees them, see ``merge``); in principal directions it is activation or obs. ``allocation``: "uniform" (the
    same share of each group), "global" (the lowest scores wherever they are), "isomorphic" (the lowest among all
    structures of a kind; Fang et al., ECCV 2024), or "auto": uniform, or with data global at no more parameters
    (``budget``) where that is clearly better on held-out samples; uniform for several widths, ``method`` "fold", models
    with a configuration, which names one size for all layers, and where the model's class would be lost.
    ``basis``: features that any invertible map may go through (queries and keys, values of a head) are turned into
    their "principal" directions on ``data`` before channels go (``vfx.PrincipalBasis``), or stay as "given"; "auto" is
    principal where channels are removed by the score "auto", "activation" or "obs".
    ``round_to``: kept widths are multiples of it. ``units``: inside heads and groups "channels" go, whole "blocks", or
    "both"; "auto" is channels, and blocks where their numbers do not allow the share. "experts" are those that a router
    chooses from, by the mean of what each adds as the router weighs it ("router", REAP, Lasby et al. 2025) where there
    are data; as many stay as it chooses for a token. ``experts``: "remove" those that go, or "merge" each into the one
    left that does most nearly the same on ``data`` (by weights without): hidden channels in their nearest order,
    tensors and the router's rows averaged by the tokens that each is sent; the router then gives the merged expert
    about the mass of both, since a row cannot be log(exp + exp). "layers" are whole residual blocks of any network
    (``sparsity``: the share of them), each time the one without which the outputs on ``data`` change least (ShortGPT,
    Men et al. 2024).
    ``roles``: the kinds of groups that may go, "streams" (residual), "hidden" (between layers), "blocks" (heads, groups
    of convolutions, and what is inside); all if none is named. Positions (tokens, latents) never go.
    ``protect``: FQNs whose groups stay whole. ``variance``: approximate the variances of folded channels without data.
    ``solve``: "least_squares" solves each layer for what the dense network gives in the channels kept (or merged) on
    ``data`` (``vfx.Reconstruct``); "auto" does that, normalizes, or both, whatever does best on
    held-out samples, and gives way to a normalization that is named.
    ``normalize``: None, "repair", "rescale", "reset" towards the statistics of those channels on ``repair_samples``
    samples; "auto" is RESET with BatchNorm, else REPAIR, and None without data. ``dynamic_shapes`` and
    ``outputs`` (those that count, which alone are returned): as for ``vfx.trace``, ``checkpoint``: for ``vfx.prune``.
    The network is of the user's class, its layers resized, where its ``forward`` then computes what was proved; else
    the report says why it is a GraphModule.
    Example: ``vfx.prune_structured(model, x, units="layers", sparsity=0.25, data=loader)``;
    ``vfx.prune_structured(model, x, sparsity=[0.25, 0.5, 0.75], data=loader).networks[0.5]``.
    Raises ArgumentError, DataError, CaptureError, CheckpointError, OutputError, PassError, VerificationError.
    """
    options = StructuredOptions(
        sparsity=sparsity, method=method, score=score, basis=basis, allocation=allocation, budget=budget,
        round_to=round_to, units=units, experts=experts, roles=roles, protect=protect, variance=variance,
        data=reusable(data), solve=solve, judge=judge, loss=loss, max_samples=max_samples,
        repair_samples=repair_samples, normalize=normalize, dynamic_shapes=dynamic_shapes, outputs=outputs,
        verify=verify, seed=seed, device=device, checkpoint=checkpoint, progress=progress,
    )  # fmt: skip
    with resumable(options, model, example_inputs):
        if isinstance(sparsity, Sequence):
            return prune_family(model, example_inputs, options)
        return _without_channels(model, example_inputs, options)


def _without_channels(model: nn.Module | Program, example_inputs: Any, options: StructuredOptions) -> Result:
    """The stages of ``prune_structured``."""
    watch = Stopwatch(options.progress)
    share = share_of(options)
    dense = capture_dense(model, example_inputs, options, watch)
    removals = removed(dense, share, options, watch)
    decision = decide({name: candidate.restoring for name, candidate in removals.items()}, dense.solved, watch)
    removal = removals[decision.candidate]
    restored = removal.restoring(decision.way, watch)
    return removed_result(removal, share, restored, decision, options, watch)

"""Scores of whole channels, heads and groups, aggregated over all members of a symmetry group.

===========  =======================================================================================================
l1           Σ |w| over every weight of every member
l2           √Σ w² over the same (``magnitude`` is another name for it)
taylor       mean over batches of (Σ g·w)², g the gradient of the loss (Molchanov et al. 2019, eq. 8, by groups)
activation   √E[x²] · ‖w‖: the feature's root mean square times the norm of the weights that read it; for queries and
             keys, which no weight reads, √E[q²] · √E[k²]
obs          what the readers lose without it when the channels left make up for it (``vfx.pruning.elimination``)
random       uniform numbers
===========  =======================================================================================================

A group inside blocks is scored in each block: arrays of shape (blocks, size), (size,) otherwise. Norm statistics and
other buffers are no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vfx.analyse.groups import Group, Member
from vfx.analyse.symmetry import Symmetry
from vfx.capture.outputs import named_tensors
from vfx.errors import ArgumentError
from vfx.on_read import OnRead
from vfx.program import Program, run
from vfx.pruning.elimination import elimination_scores
from vfx.pruning.places import blocks_along, channels_along
from vfx.pruning.second_moments import SecondMoments
from vfx.statistics.data import Batches

Scores = Mapping[int, NDArray[np.float64]]  # by group index
GivenScores = Mapping[int, NDArray[Any] | Tensor]  # the same, as users have them
Loss = Callable[[Any, Any], Tensor]  # of the network's output and what a batch holds behind the inputs (or None)
METHODS = ("magnitude", "l1", "l2", "taylor", "activation", "obs", "random")
NEED_MOMENTS = ("activation", "obs")
NEED_DATA = ("taylor", *NEED_MOMENTS)


def channel_scores(
    program: Program,
    facts: Symmetry,
    method: str = "l2",
    *,
    data: Any = None,
    moments: SecondMoments | None = None,
    loss: Loss | None = None,
    max_samples: int | None = None,
    seed: int = 0,
) -> dict[int, NDArray[np.float64]]:
    """The score of every channel of every group. Raises ArgumentError for an unknown method or missing data."""
    if method not in METHODS:
        raise ArgumentError(f"score={method!r} is unknown for channels; choose one of {', '.join(METHODS)}")
    if method in NEED_DATA and data is None and moments is None:
        raise ArgumentError(f"score={method!r} reads data; give data=")
    if method == "random":
        generator = np.random.default_rng(seed)
        return {g.index: generator.random(g.shape) for g in facts.groups}
    if method == "taylor":
        return _taylor(program, facts, data, loss or own_loss, max_samples)
    weights = {name: program.weights[0][name] for name in _names(program, facts)}
    if method == "l1":
        return _summed(facts, OnRead(weights, lambda _, weight: weight.abs().double()))
    squares = OnRead(weights, lambda _, weight: weight.to(torch.float64, copy=True).square_())
    if method not in NEED_MOMENTS:
        return {g: np.sqrt(s) for g, s in _summed(facts, squares).items()}
    assert moments is not None
    scores = _by_activation(facts, squares, moments)
    if method == "obs":
        for group in facts.groups:
            eliminated = elimination_scores(facts, group, weights, moments)
            scores[group.index] = scores[group.index] if eliminated is None else eliminated
    return scores


def _by_activation(
    facts: Symmetry, squares: Mapping[str, Tensor], moments: SecondMoments
) -> dict[int, NDArray[np.float64]]:
    readers = _summed(facts, squares, roles=("in",))
    scores = {}
    for group in facts.groups:
        product = moments.products(group) if group.index in moments.unread else None
        scores[group.index] = np.sqrt(readers[group.index] * moments.squares(group) if product is None else product)
    return scores


def _names(program: Program, facts: Symmetry) -> list[str]:
    """Floating parameters that some group moves."""
    names = dict.fromkeys(m.fqn for g in facts.groups for m in g.members)
    return [n for n in names if program.is_parameter(n)]


def _summed(
    facts: Symmetry, values: Mapping[str, Tensor], roles: tuple[str, ...] = ("out", "in", "elementwise")
) -> dict[int, NDArray[np.float64]]:
    """For each channel the sum of ``values`` over all else, over every member with one of these roles.

    Each tensor is read once, and none is held beside another.
    """
    members = [(g, m) for g in facts.groups for m in g.members if m.fqn in values and m.role in roles]
    places: dict[str, list[int]] = {}
    for k, (_, member) in enumerate(members):
        places.setdefault(member.fqn, []).append(k)
    parts: dict[int, NDArray[np.float64]] = {}
    for fqn, here in places.items():
        parts |= _parts(facts, [members[k] for k in here], values[fqn], here)
    sums = {g.index: np.zeros(g.shape) for g in facts.groups}
    for k, (group, _) in enumerate(members):
        sums[group.index] += parts[k]
    return sums


def _parts(facts: Symmetry, members: Sequence[tuple[Group, Member]], values: Tensor, keys: Sequence[int]) -> Any:
    """What one tensor adds to the channels of its members, by key."""
    return {
        key: channel_sums(facts, group, member.fqn, member.dim, values) for key, (group, member) in zip(keys, members)
    }


def channel_sums(facts: Symmetry, group: Group, fqn: str, dim: int, values: Tensor) -> NDArray[np.float64]:
    """A tensor summed over everything but the channels that stand on its axis ``dim``: (size,) or (blocks, size)."""
    where, channel = channels_along(facts, fqn, dim, group.index)
    if group.parent is None:
        line = _kept_dims(values, (dim,))[where]
        return _binned(channel, line, (group.size,))
    across, rows, block = blocks_along(facts, fqn, dim, group)
    if across is None:
        line = _kept_dims(values, (dim,))[where]
        return _binned(block * group.size + channel, line, group.blocks)
    plane = _kept_dims(values, (across, dim))[np.ix_(rows, where)]
    return _binned((block[:, None] * group.size + channel).reshape(-1), plane.reshape(-1), group.blocks)


def _binned(index: NDArray[np.int64], values: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Values summed by index."""
    return np.bincount(index, values, minlength=int(np.prod(shape))).astype(np.float64).reshape(shape)


def _kept_dims(values: Tensor, dims: tuple[int, ...]) -> NDArray[np.float64]:
    """Summed over all axes but ``dims``, which come out in this order."""
    rest = [d for d in range(values.ndim) if d not in dims]
    summed = values.sum(rest) if rest else values
    return (summed if list(dims) == sorted(dims) else summed.T).cpu().numpy()


# gradients ------------------------------------------------------------------------------------------------------------


def own_loss(output: Any, labels: Any) -> Tensor:
    """Cross-entropy of the first output with the batch's labels, or the network's own answers where it has none."""
    logits = next(iter(named_tensors(output).values()))
    classes = logits.flatten(0, -2) if logits.ndim != 2 else logits
    are_classes = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.numel() == len(classes)
    target = labels.reshape(-1).to(classes.device) if are_classes else classes.argmax(1).detach()
    return F.cross_entropy(classes, target)


def _taylor(program: Program, facts: Symmetry, data: Any, loss: Loss, max_samples: int | None) -> Any:
    names = _names(program, facts)
    total = {g.index: np.zeros(g.shape) for g in facts.groups}
    count = 0
    for inputs, labels in labelled(program, data, max_samples) if names else ():
        weights = dict(program.weights[0])
        leaves = {name: weights[name].detach().requires_grad_() for name in names}
        with torch.enable_grad():
            value = loss(run(program.graph, weights | leaves, inputs), labels)
            gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        given = {name: gradient for name, gradient in zip(names, gradients) if gradient is not None}
        products = OnRead(given, lambda name, gradient, of=weights: (gradient * of[name]).double())  # type: ignore[misc]
        for group, score in _summed(facts, products).items():
            total[group] += score**2
        count += 1
    return {group: score / max(count, 1) for group, score in total.items()}


def labelled(program: Program, data: Any, max_samples: int | None) -> Iterator[tuple[list[Tensor], Any]]:
    """Batches of inputs, each with what stands behind them (labels), or None."""
    batches = Batches(program, data, max_samples)
    return batches.labelled(lambda raw, width, samples: _behind(raw, width))


def _behind(raw: Any, width: int) -> Tensor | None:
    behind = raw[width] if isinstance(raw, (tuple, list)) and len(raw) > width else None
    return behind if isinstance(behind, Tensor) else None

"""WoodFisher (Singh & Alistarh 2020): what a weight is worth when the others make up for its loss.

The loss around a trained network is ½ δᵀ F δ with the damped empirical Fisher matrix F = λI + (1/N) Σ g_n g_nᵀ, cut
into blocks of neighbouring weights of one layer. Removing weight q at least cost moves the rest by −w_q F⁻¹e_q/[F⁻¹]_qq
and costs w_q²/(2 [F⁻¹]_qq) (optimal brain surgeon, Hassibi & Stork 1993).

With N gradients G (N, B) of a block of B weights and N < B no B × B matrix is needed (Woodbury):

    F⁻¹ = (1/λ) (I − Gᵀ (NλI + G Gᵀ)⁻¹ G)

so one Cholesky factor L of the N × N matrix NλI + G Gᵀ gives the diagonal, (1 − ‖L⁻¹G e_q‖²)/λ, and every product with
F⁻¹. Where N ≥ B the block itself is inverted. The differences are taken in float64.

The weights that stay are updated by the sum of the single corrections, as in the public code ("sum"), or by the exact
minimiser for all removed weights of the block at once ("joint"): δ_S = G_Sᵀ (NλI + G_S G_Sᵀ)⁻¹ G_Q w_Q.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vfx.arguments import checked
from vfx.errors import ArgumentError
from vfx.pruning.gradients import Labels, Loss, SampleGradients
from vfx.pruning.scores.score import Pruned, Score, Scored, Subject

Update = Literal["sum", "joint"]
Factors = tuple[Tensor, Tensor]  # a block's Cholesky factor and the diagonal of its inverse
GRADIENTS = 400  # where the user sets no bound on the samples


@dataclass(frozen=True)
class _Block:
    """Neighbouring weights start … stop of one flattened tensor; its columns begin at ``column`` of its part."""

    name: str
    start: int
    stop: int
    column: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def columns(self) -> slice:
        return slice(self.column, self.column + self.size)


@dataclass(frozen=True)
class _Part:
    """Blocks whose gradients (N, width) and factors are in memory together."""

    blocks: list[_Block]

    @property
    def width(self) -> int:
        return self.blocks[-1].column + self.blocks[-1].size

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(block.name for block in self.blocks))


class Inverse:
    """(λI + GᵀG/N)⁻¹ of one block, never formed where N < B; G is float (N, B)."""

    def __init__(self, gradients: Tensor, damping: float, factors: Factors | None = None):
        self.gradients, self.damping = gradients.double(), damping
        self.narrow = gradients.shape[0] < gradients.shape[1]
        self.factor = factors[0] if factors else torch.linalg.cholesky(self._system())
        self.diagonal = factors[1] if factors else self._diagonal()  # [F⁻¹]_qq (B,)

    def _diagonal(self) -> Tensor:
        if not self.narrow:
            return torch.cholesky_inverse(self.factor).diagonal()
        half = torch.linalg.solve_triangular(self.factor, self.gradients, upper=False)
        return (1 - half.square_().sum(0)) / self.damping

    def times(self, vector: Tensor) -> Tensor:
        """F⁻¹ v (B,)."""
        if not self.narrow:
            return torch.cholesky_solve(vector[:, None], self.factor)[:, 0]
        inner = torch.cholesky_solve((self.gradients @ vector)[:, None], self.factor)[:, 0]
        return (vector - self.gradients.T @ inner) / self.damping

    def _system(self) -> Tensor:
        g, count = self.gradients, len(self.gradients)
        system = g @ g.T if self.narrow else (g.T @ g).div_(count)
        system.diagonal().add_(self.damping * (count if self.narrow else 1))
        return system


class WoodFisher(Score):
    """Half the squared weight over its diagonal entry of the damped inverse Fisher block; the rest makes up for it.

    ``block``: weights per block at most. ``update``: "sum", "joint" or None. ``minibatch``: samples averaged behind one
    gradient. ``memory``: bytes for gradients and factors; what does not fit is computed in several passes.
    """

    name: ClassVar[str] = "woodfisher"
    needs_data: ClassVar[bool] = True

    @checked
    def __init__(
        self,
        block: int = 2000,
        damping: float = 1e-5,
        update: Update | None = "sum",
        *,
        loss: Loss | None = None,
        labels: Labels = "sampled",
        minibatch: int = 1,
        memory: int = 5 << 29,
    ):
        if not damping > 0:
            raise ArgumentError(f"damping must be above 0, got {damping!r}")
        self.block, self.damping, self.update = block, damping, update
        self.loss, self.labels, self.moves_weights = loss, labels, update is not None
        self.minibatch, self.memory = minibatch, memory

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        return _Run(self, subject).scores()

    def prepare(self, subject: Subject) -> Scored:
        if self.update is None:
            return super().prepare(subject)
        run = _Run(self, subject)
        return Scored(run.scores(), lambda masks: Pruned(masks, run.updated(masks)))


class _Run:
    """One use of the score on one network; gradients and factors are kept where they fit into memory."""

    def __init__(self, score: WoodFisher, subject: Subject):
        self.score, self.subject = score, subject
        self.samples = subject.max_samples or GRADIENTS * score.minibatch
        self.data = subject.batches(self.samples).held()  # every pass reads the same samples, shuffled or not
        self.weights = {target.name: subject.weight(target) for target in subject.targets}
        self.parts = list(self._parts())
        self.held: list[tuple[Tensor, list[Factors]]] = []

    def scores(self) -> dict[str, Tensor]:
        values = {name: torch.empty_like(weight, dtype=torch.float64) for name, weight in self.weights.items()}
        for part in self.parts:
            gradients = self._gradients(part)
            factors: list[Factors] = []
            for block in part.blocks:
                inverse = Inverse(gradients[:, block.columns], self.score.damping)
                weight = self._weight(block)
                values[block.name].view(-1)[block.start : block.stop] = weight.square() / (2 * inverse.diagonal)
                if self.score.update == "sum" and len(self.parts) == 1:
                    factors.append((inverse.factor, inverse.diagonal))
            if len(self.parts) == 1 and self.score.update:
                self.held.append((gradients, factors))
        return values

    def updated(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights that stay, moved to make up for those that go."""
        weights = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in self.weights.items()}
        correct = self._summed if self.score.update == "sum" else self._joint
        for index, part in enumerate(self.parts):
            gradients, factors = self.held[index] if self.held else (self._gradients(part), [])
            for position, block in enumerate(part.blocks):
                kept = masks[block.name].reshape(-1)[block.start : block.stop]
                if kept.all():
                    continue
                weight = self._weight(block)
                known = factors[position] if factors else None
                moved = weight + correct(gradients[:, block.columns], weight, kept, known)
                weights[block.name].view(-1)[block.start : block.stop] = torch.where(kept, moved, 0.0).to(gradients)
        return {name: weight.to(self.weights[name]) for name, weight in weights.items()}

    def _summed(self, gradients: Tensor, weight: Tensor, kept: Tensor, factors: Factors | None) -> Tensor:
        inverse = Inverse(gradients, self.score.damping, factors)
        return -inverse.times(torch.where(kept, 0.0, weight / inverse.diagonal))

    def _joint(self, gradients: Tensor, weight: Tensor, kept: Tensor, factors: Factors | None) -> Tensor:
        staying, going = gradients[:, kept].double(), gradients[:, ~kept].double()
        count = len(gradients)
        change = torch.zeros_like(weight)
        goal = going @ weight[~kept]
        if staying.shape[1] > count:
            system = staying @ staying.T
            system.diagonal().add_(count * self.score.damping)
            change[kept] = staying.T @ torch.cholesky_solve(goal[:, None], torch.linalg.cholesky(system))[:, 0]
        elif staying.shape[1]:
            system = staying.T @ staying
            system.diagonal().add_(count * self.score.damping)
            right = (staying.T @ goal)[:, None]
            change[kept] = torch.cholesky_solve(right, torch.linalg.cholesky(system))[:, 0]
        return change

    def _weight(self, block: _Block) -> Tensor:
        return self.weights[block.name].reshape(-1)[block.start : block.stop].double()

    def _gradients(self, part: _Part) -> Tensor:
        """Gradients (N, width) of a part's blocks; those of weights that are gone already are 0."""
        source = SampleGradients(self.subject, self.score.loss, self.score.labels, self.score.minibatch)
        first = self.weights[part.names[0]]
        dtype = torch.promote_types(first.dtype, torch.float32)
        rows = torch.empty(self.samples // self.score.minibatch, part.width, dtype=dtype, device=first.device)
        done = 0
        batches = replace(self.subject, data=self.data).batches(self.samples)
        for chunk in source.chunks(part.names, batches):
            count = len(next(iter(chunk.values())))
            for block in part.blocks:
                flat = chunk[block.name].flatten(1)[:, block.start : block.stop]
                rows[done : done + count, block.columns] = flat
            done += count
        for block in part.blocks:
            if block.name in self.subject.kept:
                gone = ~self.subject.kept[block.name].reshape(-1)[block.start : block.stop]
                rows[:, block.columns].masked_fill_(gone, 0)
        return rows[:done]

    def _parts(self) -> Iterator[_Part]:
        blocks: list[_Block] = []
        column, used, count = 0, 0, self.samples // self.score.minibatch
        for name, weight in self.weights.items():
            for start, stop in _cut(weight.numel(), self.score.block):
                size = stop - start
                cost = 4 * count * size + 8 * min(count, size) ** 2
                if blocks and used + cost > self.score.memory:
                    yield _Part(blocks)
                    blocks, column, used = [], 0, 0
                blocks.append(_Block(name, start, stop, column))
                column, used = column + size, used + cost
        yield _Part(blocks)


def _cut(size: int, block: int) -> Iterator[tuple[int, int]]:
    """The fewest ranges of at most ``block`` that cover ``size``, of nearly equal length."""
    count = -(-size // block)
    for index in range(count):
        yield index * size // count, (index + 1) * size // count

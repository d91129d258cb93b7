"""FoldChannels: channels are merged instead of removed (model folding, Wang et al., ICLR 2025).

Each group's channels are clustered by k-means and every cluster becomes one channel (``vfx.pruning.clusters``); without
data the variances of merged channels are approximated from the correlation of their filters. Goals for a later REPAIR
are the means of the clusters' statistics. Groups inside blocks and their blocks (heads × dim) are not alike enough to
be averaged channel by channel: of them the strongest are kept, as ``RemoveChannels`` does.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from vfx.analyse.layers import number_layers
from vfx.analyse.symmetry import symmetry
from vfx.arguments import checked
from vfx.program import Program
from vfx.pruning.choice import choose_sizes
from vfx.pruning.clusters import channel_vectors, cluster, merged, merged_goals, pairs, scaled_rows
from vfx.pruning.groups import channel_scores
from vfx.pruning.removed import Removed
from vfx.pruning.widths import Widths, strongest
from vfx.resize import RemovalUnits, resize
from vfx.resize.channels import KeptChannels
from vfx.resize.masked import prove
from vfx.rewrite import Pass, PassResult


class FoldChannels(Pass[Removed]):
    """Merge the channels of each group into ``1 - sparsity`` as many; options as for ``RemoveChannels``.

    ``variance`` approximates the variances of merged channels without data. The record of ``run`` is a
    ``Removed``.
    """

    weight_sets = "one"
    needs = (symmetry, number_layers)

    @checked
    def __init__(
        self,
        sparsity: float,
        *,
        allocation: str = "uniform",
        budget: str = "channels",
        round_to: int = 1,
        units: str = "auto",
        roles: Sequence[str] = (),
        protect: Collection[str] = (),
        variance: bool = True,
        verify: bool = True,
        seed: int = 0,
    ):
        self.widths = Widths(allocation, round_to, tuple(protect), units, tuple(roles))
        self.sparsity, self.budget, self.variance = sparsity, budget, variance
        self.verify, self.seed = verify, seed

    def apply(self, program: Program) -> PassResult[Removed]:
        facts = symmetry(program)
        slots = RemovalUnits(facts)
        scores = channel_scores(program, facts)
        sizes, left = choose_sizes(program, facts, slots, scores, self.widths, self.sparsity, self.budget)
        norm_pairs = pairs(program)
        weights = scaled_rows(program.weights[0], norm_pairs)
        outer = {group.parent for group in facts.groups}
        plain = [g for g in facts.groups if g.parent is None and g.index not in outer and sizes[g.index] < g.size]
        clusters = {
            g.index: cluster(channel_vectors(g, program, weights, norm_pairs), sizes[g.index], self.seed) for g in plain
        }
        kept = strongest(facts, scores, sizes) | {g: c.kept for g, c in clusters.items()}
        folded = replace(
            program.with_weights([merged(facts, weights, norm_pairs, clusters, self.variance)]),
            goals=merged_goals(program, facts, clusters),
        )
        rest = [g.name for g in facts.groups if g not in plain and sizes[g.index] < g.size]
        notes = (f"folding: of {len(rest)} groups with blocks channels are removed: {', '.join(rest)}",) if rest else ()
        small = resize(folded, facts, kept, slots=slots, note=f"FoldChannels({len(plain)} groups)")
        error = prove(folded, facts, small, kept, self.seed) if self.verify else None
        carry = KeptChannels(small, facts, {g: clustering.average for g, clustering in clusters.items()})
        result = small.program.with_notes((*left, *notes))
        return PassResult(result, Removed(sizes, kept, carry, error, clusters))

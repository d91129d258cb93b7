"""The run: all calibration batches advance together, layer by layer, and each layer is solved on exact sums of all
data.

The network reads its own values, all layers before solved already; the references advance beside it to the value that
is the layer's goal. Behind a layer only the values that are still needed wait for the other batches, past
``memory_limit`` in a temporary file (``vfx.statistics.spill``): memory does not grow with the number of samples.

A weight that several calls read is solved at the first of them: copies of the executions run ahead, with the weight as
it is, and the sums of all its calls are added up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from vfx.checkpointing.journal import Saved, Section, section
from vfx.processes import added, agreed, shared
from vfx.program import Execution, Program
from vfx.progress import track
from vfx.reconstruct.collect import Collected
from vfx.reconstruct.logits import RIDGE as LOGITS
from vfx.reconstruct.logits import LogitUnit
from vfx.reconstruct.references import References
from vfx.reconstruct.solve import RIDGES, START, System, bounded, chosen_ridge
from vfx.reconstruct.sums import Sums
from vfx.reconstruct.units import Unit
from vfx.statistics.data import Batches
from vfx.statistics.spill import MEMORY_LIMIT, Spill

Source = Batches | Sequence[Batches]  # for all references, or for each its own
HELD = 5  # one sample in so many is held out to choose the ridge


@dataclass(frozen=True)
class Options:
    """``ridge`` None is chosen for each unit on held-out samples; ``max_rows`` bounds the rows of a batch."""

    ridge: float | None = None
    max_rows: int | None = None
    memory_limit: int | None = None
    progress: bool = True


@dataclass(frozen=True)
class Solved:
    """One unit: its first call, its ridge, and ‖X W − Y‖²/‖Y − mean‖² before and after."""

    node: str
    ridge: float
    before: float
    after: float


@dataclass
class _Bundle:
    """One batch on its way through the network and through the references."""

    network: Execution
    references: list[Execution]
    held: bool
    owner: int | None = None  # the reference that alone gives its goals

    def ahead(self, plan: list, plans: Sequence[list]) -> _Bundle:  # type: ignore[type-arg]
        """A copy that runs on without touching this one's values."""
        runs = [run.fork(its_plan) for run, its_plan in zip(self.references, plans)]
        return _Bundle(self.network.fork(plan), runs, self.held, self.owner)


class Sweep:
    """Solves the ``units`` of a network for the ``references``; ``weights`` are changed as it goes."""

    def __init__(
        self, program: Program, weights: dict[str, Tensor], references: References,
        units: Sequence[Unit | LogitUnit], options: Options,
    ):  # fmt: skip
        self.program, self.weights, self.references, self.units = program, weights, references, units
        self.options = options
        self.plan = program.plan
        self.position = {step.node: index for index, step in enumerate(self.plan)}
        self._bundles: list[_Bundle] = []
        self._ridge = RIDGES[START]  # the last unit's; the next one's is mostly near it

    @torch.no_grad()
    def run(
        self, batches: Source, centre: Callable[[Unit], tuple[Tensor, Tensor | None]], masks: Mapping[str, Tensor]
    ) -> list[Solved]:
        """Solve unit after unit; ``centre`` gives the matrix and bias that the ridge draws it to.

        Of ``batches`` for each reference, each is solved for what that reference alone gives on them.
        """
        limit = MEMORY_LIMIT if self.options.memory_limit is None else self.options.memory_limit
        shared = [t for r in self.references.all for t in r.program.weights[0].values()]
        solved, self._bundles = [], []
        journal = section("reconstruction", [unit.uses[0].node.name for unit in self.units])
        with Spill(limit, [*self.weights.values(), *shared]) as spill:
            for number, unit in enumerate(track(self.units, "reconstruction", len(self.units), self.options.progress)):
                if isinstance(unit, LogitUnit):
                    self._turn(unit, batches, spill, journal, number)
                    continue
                saved = journal.entry(number, self.weights)
                if saved is not None:
                    solved.append(self._restored(unit, saved, batches, spill))
                    continue
                fit, held = self._sums(unit, batches, spill, number == len(self.units) - 1)
                problem = unit.problem(centre(unit), masks)
                outcome, written = self._solve(unit, problem, fit, held)
                self.weights.update(written)
                journal.write(number, written, vars(outcome))
                solved.append(outcome)
        self._bundles = []
        return solved

    def _sums(self, unit: Unit, batches: Source, spill: Spill, last: bool) -> tuple[Sums, Sums | None]:
        """The sums of all batches, those of the held-out samples apart."""
        parts: defaultdict[bool, Collected] = defaultdict(Collected)
        spill.next_stage()
        for bundle in list(self._bundles) or self._started(batches):
            self._fetched(bundle, spill)
            self._collect(unit, bundle, parts[bundle.held])
            if not last:
                self._kept(bundle, spill)
                continue
            for run in (bundle.network, *bundle.references):
                run.values.clear()
        tensors = added({held: sums.sums().tensors() for held, sums in parts.items()})
        whole = {held: Sums.of_tensors(tensors_of) for held, tensors_of in tensors.items()}
        if False not in whole:  # too few samples to hold any out
            return whole[True], None
        return whole[False], whole.get(True)

    def _restored(self, unit: Unit, saved: Saved, batches: Source, spill: Spill) -> Solved:
        """Take a unit's solution from the run before; values go on where they are needed next."""
        node = unit.uses[0].node
        if self.program.read_before(self.plan[self.position[node] :], saved.tensors):
            self._brought(node, batches, spill)
        self.weights.update(saved.tensors)
        outcome = Solved(**saved.values)
        if self.options.ridge is None:
            self._ridge = outcome.ridge
        return outcome

    def _brought(self, node: fx.Node, batches: Source, spill: Spill) -> None:
        """Run the network on all batches up to a node."""
        spill.next_stage()
        for bundle in list(self._bundles) or self._started(batches):
            self._fetched(bundle, spill)
            self._advance(bundle.network, node)
            self._kept(bundle, spill)

    def _fitted(self, unit: LogitUnit, batches: Source, spill: Spill) -> Tensor:
        """The map that brings an attention call's queries to the reference's logits."""
        total: tuple[Tensor, Tensor] | None = None
        spill.next_stage()
        for bundle in list(self._bundles) or self._started(batches):
            self._fetched(bundle, spill)
            self._advance(bundle.network, unit.node)
            self.references.approach(bundle.references, unit.node.name)
            total = unit.add(total, bundle.network, bundle.references[0], self.references.all[0])
            self._kept(bundle, spill)
        ((left, right),) = added({} if total is None else {"logits": total}).values()
        return unit.solve((left, right), LOGITS if self.options.ridge is None else self.options.ridge)

    def _turn(self, unit: LogitUnit, batches: Source, spill: Spill, journal: Section, number: int) -> None:
        """Fit an attention call's queries to the reference's logits; the values that wait are turned alike."""
        saved = journal.entry(number, {"turn": self.weights[next(iter(self.weights))]})
        if saved is None:
            turn = self._fitted(unit, batches, spill)
            journal.write(number, {"turn": turn})
        else:
            turn = saved.tensors["turn"]
            self._brought(unit.node, batches, spill)
        self.weights.update(unit.write(self.weights, turn))
        spill.next_stage()
        for bundle in self._bundles:
            self._fetched(bundle, spill)
            old = bundle.network.values[unit.query]
            bundle.network.values[unit.query] = (old.double() @ turn.to(old.device)).to(old)
            self._kept(bundle, spill)

    def _fetched(self, bundle: _Bundle, spill: Spill) -> None:
        for run in (bundle.network, *bundle.references):
            spill.fetch(run)

    def _kept(self, bundle: _Bundle, spill: Spill) -> None:
        for run in (bundle.network, *bundle.references):
            spill.keep(run)

    def _started(self, batches: Source) -> Iterator[_Bundle]:
        """New executions for each batch, drawn when it is its turn."""
        holds = self.options.ridge is None
        sources = [(None, batches)] if isinstance(batches, Batches) else enumerate(batches)
        for owner, source in sources:
            parts = source.parts(HELD) if holds else ((batch, False) for batch in source)
            for batch, held in shared(parts, lambda part: part[0], lambda part: part[1]):
                network = Execution(self.program.graph, self.weights, batch, self.plan)
                self._bundles.append(_Bundle(network, self.references.start(batch), held, owner))
                yield self._bundles[-1]

    def _collect(self, unit: Unit, bundle: _Bundle, collected: Collected) -> None:
        self._advance(bundle.network, unit.uses[0].node)
        if len(unit.uses) > 1:
            bundle = bundle.ahead(careful(self.plan), [careful(plan) for plan in self.references.plans])
        for index, use in enumerate(unit.uses):
            self._advance(bundle.network, use.node)
            goal = self.references.goal(bundle.references, use.goal.name, bundle.owner)
            if use.other is not None:
                goal = goal - bundle.network.value(use.other)
            unit.collect(collected, index, bundle.network.value, goal, self.options.max_rows)

    def _advance(self, run: Execution, node: fx.Node) -> None:
        """Run up to a node, which is the next to run then."""
        while run.position < self.position[node]:
            run.step()

    def _solve(self, unit: Unit, problem, fit: Sums, held: Sums | None):  # type: ignore[no-untyped-def]
        """What is said of a unit, and the tensors that are its solution."""
        total = fit if held is None else fit + held
        system = System(problem, total)
        if self.options.ridge is None and held is not None:
            chosen = chosen_ridge(problem, fit, held, self._ridge)
            solution, ridge = agreed(bounded(problem, system, chosen))
            self._ridge = ridge
        else:
            ridge = self._ridge if self.options.ridge is None else self.options.ridge
            solution, ridge = agreed((system.solve(ridge), ridge))
        spread = float((total.squares - total.goals.square() / max(total.count, 1)).sum())
        scale = max(spread, 1e-300)
        written = unit.write(self.weights, solution.matrix, solution.bias, total)
        outcome = Solved(unit.uses[0].node.name, ridge, system.before / scale, max(solution.error, 0.0) / scale)
        return outcome, written


def careful(plan: list) -> list:  # type: ignore[type-arg]
    """A plan that writes into no value that it was given."""
    return [step._replace(in_place=None) for step in plan]

"""Do matchers find a permutation that is known? A against π(A) + noise, over torchvision's networks and trained pairs.

A has random weights (norms and their statistics spread, so that channels differ), or is trained. π moves every group.
Gaussian noise of 1 % of each parameter's standard deviation is added to π(A). A matcher that finds p recovers a group
if r = π∘p is the identity, or exchanges only channels that cannot be told apart:

- weight matching: their slices of every member differ by no more than two draws of the noise do;
- activation matching: at every tap their features are constant in one of the two edges (nothing correlates with a
  constant), or correlate to 1 − 1e-4 with each other in A.

Channels that were exchanged and count as recovered by this rule are listed ("like channels").

For what is not recovered the objective tells why: below that of π⁻¹ the search stopped in a local optimum; at or above
it, the noise has made another permutation the better one. Each network runs in a process of its own, whose peak memory
is reported. Results go to ``benchmarks/results``: recovery.json and recovery.md.
"""

from __future__ import annotations

import inspect
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torchvision
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from benchmarks.fashion import CHECKPOINTS, FASHION_MNIST, PAIRS, RESULTS, MissingData, command, fashion_mnist
from benchmarks.memory import peak_memory
from benchmarks.options import Checkpoints, DataFolder, Output
from benchmarks.pairs_report import grid
from vfx.analyse.groups import Group
from vfx.analyse.places import Index
from vfx.analyse.symmetry import Symmetry
from vfx.analyse.verify import randomise
from vfx.api import symmetry, trace
from vfx.elements import Permutations, act, compose_permutations, inverse_permutations, permuted, random_permutations
from vfx.elements.permutations import moved
from vfx.files import write_atomic
from vfx.match.activation import ActivationMatching
from vfx.match.matcher import Matching
from vfx.match.matcher import Problem as MatchingProblem
from vfx.match.units import units
from vfx.match.weight import WeightMatching
from vfx.operators import operator_of, weight_name
from vfx.program import Program, Weights
from vfx.statistics.collect import Statistics, collect
from vfx.statistics.taps import Tap

NETWORKS = (
    *("vgg16_bn", "resnet18", "resnet50", "wide_resnet50_2", "densenet121", "squeezenet1_0", "mobilenet_v2"),
    *("efficientnet_b0", "mnasnet0_5", "convnext_tiny", "inception_v3", "googlenet", "shufflenet_v2_x0_5"),
    *("regnet_y_400mf", "resnext50_32x4d", "swin_t", "vit_b_16"),
)
SIZES = {
    "inception_v3": (128, 256),
    "vgg16_bn": (32, 2048),
    "vit_b_16": (224, 64),
    "swin_t": (64, 256),
}  # side and number of images where the default fails
NOISE, SAMPLES, BATCH, SIDE = 0.01, 512, 32, 64
IDENTICAL, CONSTANT = 1e-4, 1e-6
console = Console(stderr=True)


@dataclass(frozen=True)
class Problem:
    """Edge 0 is A, edge 1 is π(A) + noise."""

    program: Program
    facts: Symmetry
    truth: Permutations  # π
    data: Tensor

    @classmethod
    def make(cls, model: nn.Module, data: Tensor, seed: int, trained: bool) -> Problem:
        program = trace(model, data[:2])
        facts = symmetry(program)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            first = dict(program.weights[0]) if trained else random_weights(program, data[:BATCH], generator)
        truth = random_permutations(facts.groups, np.random.default_rng(seed))
        second = {
            name: tensor if name in program.buffers else noisy(tensor, generator)
            for name, tensor in act(facts, permuted(truth), first).items()
        }
        return cls(program.with_weights([first, second]), facts, truth, data)

    def residual(self, matching: Matching) -> dict[int, Index]:
        """π∘p: the identity where a group is recovered."""
        return compose_permutations(self.facts.groups, self.truth, matching.permutations[1])

    def inverse(self) -> dict[int, Index]:
        return inverse_permutations(self.facts.groups, self.truth)


def random_weights(program: Program, batch: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """The initial weights with norms, their statistics and layer scales spread, but no channel silenced."""
    weights = dict(program.weights[0])
    for node in program.graph.nodes:
        scale, shift = (weight_name(node, x) if operator_of(node).is_batch_norm else None for x in ("weight", "bias"))
        if scale is not None:
            weights[scale] = 0.5 + torch.rand(weights[scale].shape, generator=generator)
        if shift is not None:
            weights[shift] = 0.3 * torch.randn(weights[shift].shape, generator=generator)
    return randomise(program.with_weights([weights]), [batch], generator)


def noisy(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point() or tensor.numel() < 2:
        return tensor
    return tensor + NOISE * tensor.std() * torch.randn(tensor.shape, generator=generator)


def smooth_images(count: int, side: int, seed: int) -> Tensor:
    """Random images (count, 3, side, side) with structure on several scales."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(count, 3, side, side)
    for scale in (4, 8, 16, side):
        coarse = torch.randn(count, 3, scale, scale, generator=generator)
        total += torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    return total / 2


def network(name: str) -> nn.Module:
    build = getattr(torchvision.models, name)
    fast = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    return build(weights=None, **fast).eval()


# judging ------------------------------------------------------------------------------------------------------------


def weight_identical(problem: Problem, group: Group, pairs: Index) -> np.ndarray:
    """Whether the channels of each pair (n, 2) have the same slices up to noise."""
    weights = problem.program.weights[0]
    distance, count = torch.zeros(len(pairs), dtype=torch.float64), 0
    for member in group.members:
        if member.fqn in problem.program.buffers:
            continue
        tensor = weights[member.fqn].double()
        rows = tensor.movedim(member.dim, 0)
        one, other = (rows[torch.from_numpy(member.position[pairs[:, k]])].flatten(1) for k in (0, 1))
        noise = NOISE * float(tensor.std()) if tensor.numel() > 1 else 0.0
        distance += ((one - other) / max(noise, 1e-30)).square().sum(1)
        count += one.shape[1]
    return (distance <= 2 * count).numpy()


def activation_identical(
    problem: Problem, seen: Statistics, twins: Statistics, group: Group, pairs: Index
) -> np.ndarray:
    """Whether the channels of each pair (n, 2) have constant, or perfectly correlated, features at every tap.

    ``seen`` are the statistics of both edges, ``twins`` those of A against itself.
    """
    same = np.ones(len(pairs), bool)
    for tap in seen.taps:
        if group.index not in tap.groups:
            continue
        column = tap.digits[:, tap.groups.index(group.index)]
        correlation = twins.features[tap.key].correlation(0, 1).numpy()
        first, second = (moments.std.numpy() for moments in seen.features[tap.key].moments)
        image = images(problem.facts.groups, tap, problem.inverse())
        constant = (first <= CONSTANT * first.max()) | (second[image] <= CONSTANT * second.max())
        for k, (one, other) in enumerate(pairs):
            i, j = np.flatnonzero(column == one), np.flatnonzero(column == other)
            same[k] &= bool(((constant[i] & constant[j]) | (correlation[i, j] >= 1 - IDENTICAL)).all())
    return same


def images(groups: Sequence[Group], tap: Tap, permutations: Permutations) -> Index:
    """Where each feature of a tap stands in an edge that ``permutations`` bring back: new feature f is old image[f]."""
    old = moved(groups, tap.groups, tap.digits, permutations)
    index = {tuple(row): k for k, row in enumerate(tap.digits.tolist())}
    return np.array([index[tuple(row)] for row in old.tolist()])


def judge(problem: Problem, matching: Matching, identical: Any) -> dict[str, Any]:
    """Groups recovered, exactly and up to channels that cannot be told apart, and what is wrong with the others."""
    exact, alike, wrong = 0, 0, []
    residuals = problem.residual(matching)
    for group in problem.facts.groups:
        residual = residuals[group.index]
        wrong_places = np.stack(np.nonzero(residual != np.arange(group.size)), axis=-1)
        if not len(wrong_places):
            exact += 1
            continue
        pairs = np.stack([wrong_places[:, -1], residual[tuple(wrong_places.T)]], axis=1)
        # Channels of an inner group are compared over all blocks at once: never more leniently than within their own.
        bad = ~identical(group, pairs)
        alike += int((~bad).sum())
        if bad.any():
            wrong.append({"group": group.name, "size": group.size, "wrong_channels": int(bad.sum())})
    recovered = len(problem.facts.groups) - len(wrong)
    counts = {"exact": exact, "recovered": recovered, "like_channels": alike}
    return counts | {"wrong": wrong, "seconds": round(matching.seconds, 3)}


# the two matchers ---------------------------------------------------------------------------------------------------


def weight_matching(problem: Problem) -> dict[str, Any]:
    matching = WeightMatching(classes="permutation")(MatchingProblem(problem.program, problem.facts))
    first, second = problem.program.weights
    scored = {m.fqn for g in problem.facts.groups for m in g.members} - problem.program.buffers
    best = inner(first, act(problem.facts, permuted(problem.inverse()), second), scored)
    verdict = judge(problem, matching, lambda group, pairs: weight_identical(problem, group, pairs))
    return verdict | {"sweeps": matching.sweeps[0], "objective_of_truth": round(matching.objective[0] / best, 9)}


def inner(first: Weights, second: Weights, names: set[str]) -> float:
    return sum(float(torch.sum(first[name].double() * second[name].double())) for name in names)


def activation_matching(problem: Problem) -> dict[str, Any]:
    start = time.perf_counter()
    statistics = read(problem, problem.program)
    seconds = time.perf_counter() - start
    matching = ActivationMatching("permutation")(MatchingProblem(problem.program, problem.facts, statistics))
    twins: list[Statistics] = []

    def identical(group: Group, pairs: Index) -> np.ndarray:
        if not twins:
            first = problem.program.weights[0]
            twins.append(read(problem, problem.program.with_weights([first, first])))
        return activation_identical(problem, statistics, twins[0], group, pairs)

    ratio = matching.objective[0] / correlation_at(problem, statistics, problem.inverse())
    verdict = judge(problem, matching, identical)
    return verdict | {"objective_of_truth": round(ratio, 9), "statistics_seconds": round(seconds, 3)}


def read(problem: Problem, program: Program) -> Statistics:
    return collect(program, problem.facts, problem.data.split(BATCH), layers=False, progress=False)


def correlation_at(problem: Problem, statistics: Statistics, permutations: Permutations) -> float:
    """Σ of correlations under given permutations, each tap counted once for each unit it reads as the matcher does."""
    total = 0.0
    unit = {group: index for index, one in enumerate(units(problem.facts)) for group in one.groups}
    for tap in statistics.taps:
        gain = statistics.features[tap.key].correlation(0, 1).numpy()
        total += len({unit[g] for g in tap.groups}) * float(
            gain[np.arange(tap.size), images(problem.facts.groups, tap, permutations)].sum()
        )
    return total


# running ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One network to try: torchvision's by name, or edge 0 of a trained pair."""

    name: str
    seed: int
    threads: int
    checkpoints: Path
    data: Path

    def problem(self) -> Problem:
        torch.manual_seed(self.seed)
        if self.name in PAIRS:
            images, _ = fashion_mnist(self.data, "train", 2 * SAMPLES)
            return Problem.make(PAIRS[self.name].edges(self.checkpoints)[0], images, self.seed, trained=True)
        side, samples = SIZES.get(self.name, (SIDE, SAMPLES))
        images = smooth_images(samples, side, self.seed)
        return Problem.make(network(self.name), images, self.seed, trained=False)


def measure(case: Case) -> dict[str, Any]:
    """Runs in its own process."""
    torch.set_num_threads(case.threads)
    problem = case.problem()
    before = peak_memory()
    weight = weight_matching(problem)
    behind_weight = peak_memory()
    activation = activation_matching(problem)
    return {
        "groups": len(problem.facts.groups),
        "channels": problem.facts.channels,
        "weight": weight | {"peak_mib": behind_weight},
        "activation": activation | {"peak_mib": peak_memory()},
        "peak_mib_before": before,
        "samples": len(problem.data),
    }


def markdown(results: dict[str, Any]) -> str:
    rows = []
    for name, result in results.items():
        if "error" in result:
            rows.append([name, result["error"], *[""] * 6])
            continue
        row = [name, f"{result['groups']} / {result['channels']:,}"]
        for kind in ("weight", "activation"):
            found = result[kind]
            alike = f" ({found['like_channels']})" if found["like_channels"] else ""
            row += [f"{found['recovered']} / {result['groups']}{alike}", f"{found['seconds']:.2f}"]
        row.insert(5, f"{result['activation']['statistics_seconds']:.1f}")
        peaks = (result["peak_mib_before"], result["weight"]["peak_mib"], result["activation"]["peak_mib"])
        rows.append([*row, " / ".join(map(str, peaks))])
    kinds = [f"{kind}: groups (like channels)" for kind in ("weight", "activation")]
    head = ["network", "groups / channels", kinds[0], "s", kinds[1], "statistics s", "s"]
    head.append("peak MiB: before / weight / activation")
    text = inspect.cleandoc(__doc__ or "").partition("\n\n")[2].rpartition("Results go")[0]
    failures = [f"- {line}" for name, result in results.items() for line in failed(name, result)]
    return "\n".join(
        [
            "# Recovery of a known permutation",
            "",
            text,
            "",
            *grid(head, rows),
            "",
            "## Not recovered",
            "",
            *(failures or ["Nothing: every group of every network is recovered."]),
            "",
        ]
    )


def failed(name: str, result: dict[str, Any]) -> list[str]:
    lines = []
    for kind in ("weight", "activation"):
        found = result.get(kind, {})
        if not found.get("wrong"):
            continue
        ratio = found["objective_of_truth"]
        why = "a local optimum" if ratio < 1 - 1e-9 else "the noise made another permutation better"
        groups = ", ".join(f"{w['group']} ({w['wrong_channels']} of {w['size']})" for w in found["wrong"][:6])
        more = len(found["wrong"]) - 6
        tail = f" and {more} more" if more > 0 else ""
        lines.append(f"{name}, {kind} matching: {why} (objective {ratio:.6f} of π⁻¹'s): {groups}{tail}")
    return lines


def main(
    only: Annotated[list[str] | None, typer.Option("--network", help="Only this network (may be repeated).")] = None,
    checkpoints: Checkpoints = CHECKPOINTS,
    data: DataFolder = FASHION_MNIST,
    output: Output = RESULTS,
    seed: Annotated[int, typer.Option(help="Seed of weights, permutation, noise and images.")] = 0,
    threads: Annotated[int, typer.Option(help="Torch's threads.")] = 2,
) -> None:
    """Match A against π(A) + 1 % noise and count the groups whose permutation comes back."""
    unknown = sorted(set(only or ()) - {*NETWORKS, *PAIRS})
    if unknown:
        raise typer.BadParameter(f"no network {unknown[0]!r}; there are {', '.join([*NETWORKS, *PAIRS])}")
    output.mkdir(parents=True, exist_ok=True)
    file = output / "recovery.json"
    results: dict[str, Any] = json.loads(file.read_text()) if only and file.is_file() else {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        names = only or [*NETWORKS, *PAIRS]
        absent: dict[str, MissingData] = {}
        for name in progress.track(names, description="networks"):
            try:
                results[name] = isolated(Case(name, seed, threads, checkpoints, data))
            except MissingData as error:
                absent[name] = error
                progress.console.print(f"[yellow]{name} left out:[/] {error}")
                continue
            progress.console.print(summary(name, results[name]))
            results = {known: results[known] for known in (*NETWORKS, *PAIRS) if known in results}
            write_atomic(file, json.dumps(results, indent=1) + "\n")
            write_atomic(output / "recovery.md", markdown(results))
    if len(absent) == len(names):
        raise absent[names[0]]


def isolated(case: Case) -> dict[str, Any]:
    """Measure in a fresh process; what goes wrong there is part of the result."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, case).result()
        except MissingData:
            raise
        except Exception as error:
            return {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}


def summary(name: str, result: dict[str, Any]) -> str:
    if "error" in result:
        return f"{name}: {result['error']}"
    counts = (f"{kind} {result[kind]['recovered']}/{result['groups']}" for kind in ("weight", "activation"))
    return f"{name}: {', '.join(counts)}"


if __name__ == "__main__":
    command(main)

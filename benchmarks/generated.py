"""Random networks through every pass: is any result wrong, any error raw, any alarm false?

For each network of ``benchmarks.grammar``: random elements of the full symmetry classes leave the function
("symmetry"). A copy whose channels are permuted by a random element is merged with the network half and half, which
must give the function back ("permuted"). A copy moved by an element of the full classes must do so with all weight on
it, and does so half and half if the search found the element ("moved"). Half of the channels are removed, which equals
the masked network ("pruned"). The ONNX file gives the same at two batch sizes ("onnx"). "Missed": a copy is not found
again; its merge is proved all the same. Results go to ``benchmarks/results``: generated.json and generated.md.
Anything wrong, raw or falsely alarmed ends the run with status 1.
"""

from __future__ import annotations

import collections
import copy
import json
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime
import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import vfx
from benchmarks.fashion import RESULTS
from benchmarks.grammar import network
from benchmarks.options import Fresh, Output
from benchmarks.pairs_report import cell
from vfx.analyse.verify import verify
from vfx.elements import act, random_element
from vfx.errors import VerificationError, VfxError
from vfx.files import write_atomic
from vfx.program import Program

EXACT = 1e-10  # of proofs, in float64
AT_ONCE = 40  # networks between two writes of the results
CLOSE = 2e-3  # of float32 results, against the largest output
CHECKS = ("symmetry", "permuted", "moved", "pruned", "onnx")
BAD = ("wrong", "raw", "alarm")
MISSED = "not found again"


@dataclass(frozen=True)
class Outcome:
    """What one check said of one network: "right", "wrong", "raw", "alarm", "refused" or "missed" (not found again)."""

    seed: int
    check: str
    verdict: str
    detail: str = ""
    blocks: tuple[str, ...] = ()  # beside a network's first check


def outcomes(seed: int, checks: Iterable[str] = CHECKS) -> list[Outcome]:
    """Run the checks on the network of a seed."""
    trial = Trial(seed)
    results = []
    for check in checks:
        verdict, detail = _verdict(getattr(trial, check))
        results.append(Outcome(seed, check, verdict, detail, () if results else tuple(trial.model.names())))
    return results


class Trial:
    """One network and its checks: each returns what is wrong, or nothing."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.model, self.x = network(seed)

    @cached_property
    def edges(self) -> Program:
        """The network, a permuted copy of it and one that is moved by an element of its full classes."""
        copies = [moved_copy(self.model, self.x, self.seed, classes) for classes in ("permutation", "full")]
        return vfx.trace([self.model, *copies], self.x)

    @cached_property
    def aligned(self) -> Program:
        return vfx.Align("weight")(self.edges)

    def symmetry(self) -> str:
        facts = vfx.symmetry(self.edges.select(0))
        if facts.unknown_ops:
            return f"no rule for {', '.join(facts.unknown_ops)}"
        error = verify(facts, seed=1)
        return "" if error <= EXACT else f"a random element changes the function by {error:.1e}"

    def permuted(self) -> str:
        return self._mixed(0, 1, 0) or (MISSED if self._mixed(0.5, 0.5, 0) else "")

    def moved(self) -> str:
        return self._mixed(0, 0, 1) or (MISSED if self._mixed(0.5, 0, 0.5) else "")

    def _mixed(self, *weights: float) -> str:
        """How the merged network differs from the first."""
        result = vfx.compile(self.aligned, passes=[vfx.Interpolate(weights)])
        return difference(self.model(self.x), result(self.x))

    def pruned(self) -> str:
        result = vfx.prune_structured(self.edges.select(0), sparsity=0.5, progress=False)
        given = result.module(self.x)
        if given.shape != self.model(self.x).shape or not given.isfinite().all():
            return f"the pruned network gives {tuple(given.shape)}, finite: {bool(given.isfinite().all())}"
        return ""

    def onnx(self) -> str:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "network.onnx")
            vfx.export(self.model, path, self.x)
            session = onnxruntime.InferenceSession(str(path))
            name = session.get_inputs()[0].name
            for batch in (self.x[:3], torch.cat([self.x, self.x.flip(0), self.x[:1]])):
                given = torch.from_numpy(session.run(None, {name: batch.numpy()})[0])
                wrong = difference(self.model(batch), given)
                if wrong:
                    return f"batch of {len(batch)}: {wrong}"
        return ""


def _verdict(body: Callable[[], str]) -> tuple[str, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrong = body()
    except VerificationError as error:
        return "alarm", str(error)
    except VfxError as error:
        return "refused", f"{type(error).__name__}: {error}"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return "raw", f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
    if wrong == MISSED:
        return "missed", ""
    return ("wrong", wrong) if wrong else ("right", "")


def moved_copy(model: nn.Module, x: Tensor, seed: int, classes: str = "full") -> nn.Module:
    """The network with its weights moved by a random element of its classes, or of its permutations."""
    facts = vfx.symmetry(model, x)
    program = facts.program
    element = random_element(facts, np.random.default_rng(seed), classes)
    double = {
        name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in program.weights[0].items()
    }
    moved = act(facts, element, double)
    copied = copy.deepcopy(model)
    state = copied.state_dict()
    for name, tensor in moved.items():
        if name in state:  # constants that the graph folded are not the network's
            state[name] = tensor.to(state[name].dtype)
    copied.load_state_dict(state)
    return copied


@torch.no_grad()
def difference(expected: Tensor, given: Tensor) -> str:
    error = float((expected - given).abs().max() / expected.abs().max())
    return "" if error <= CLOSE else f"differs by {error:.1e} of the largest output"


def _quiet() -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def measure(checks: Mapping[int, tuple[str, ...]], jobs: int) -> list[Outcome]:
    """The outcomes of the checks asked of each network, by its seed, in ``jobs`` processes."""
    with ProcessPoolExecutor(jobs, initializer=_quiet) as pool:
        rows = pool.map(outcomes, checks, checks.values())
        shown = track(rows, "networks", len(checks), console=Console(stderr=True))
        return [outcome for row in shown for outcome in row]


def markdown(results: list[Outcome]) -> str:
    """A table of verdicts by check, and all that was not right with its cause."""
    verdicts = ("right", *BAD, "missed", "refused")
    checks = list(dict.fromkeys(outcome.check for outcome in results))
    count = collections.Counter((outcome.check, outcome.verdict) for outcome in results)
    networks = len({outcome.seed for outcome in results})
    blocks = {name for outcome in results for name in outcome.blocks}
    lines = [
        f"# {networks} random networks of {len(blocks)} kinds of blocks",
        "",
        "`python -m benchmarks.generated`; the checks are described there. Missed: a copy is not found again by",
        "weights alone; its merge is proved all the same.",
        "",
        f"| check | {' | '.join(verdicts)} |",
        f"| --- |{' ---: |' * len(verdicts)}",
        *(f"| {check} | {' | '.join(str(count[check, verdict]) for verdict in verdicts)} |" for check in checks),
    ]
    notable = [outcome for outcome in results if outcome.verdict in (*BAD, "refused")]
    if notable:
        lines += ["", "| network | check | verdict | what was said |", "| ---: | --- | --- | --- |"]
        lines += [f"| {o.seed} | {o.check} | {o.verdict} | {cell(o.detail)} |" for o in notable]
    return "\n".join(lines) + "\n"


def main(
    networks: Annotated[int, typer.Option(help="How many networks.")] = 1000,
    first: Annotated[int, typer.Option(help="Seed of the first.")] = 0,
    jobs: Annotated[int, typer.Option(help="Processes.")] = 2,
    only: Annotated[list[str] | None, typer.Option(help=f"Only these checks: {', '.join(CHECKS)}.")] = None,
    fresh: Fresh = False,
    output: Output = RESULTS,
) -> None:
    """Run what generated.json lacks of the checks on random networks, and write it and generated.md."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / "generated.json"
    known = [] if fresh or not file.is_file() else [Outcome(**row) for row in json.loads(file.read_text())]
    done = {(outcome.seed, outcome.check) for outcome in known}
    missing = {
        seed: checks
        for seed in range(first, first + networks)
        if (checks := tuple(check for check in only or CHECKS if (seed, check) not in done))
    }
    for start in range(0, len(missing), AT_ONCE):
        known += measure(dict(islice(missing.items(), start, start + AT_ONCE)), jobs)
        known.sort(key=lambda outcome: (outcome.seed, CHECKS.index(outcome.check)))
        rows = ({key: value for key, value in asdict(outcome).items() if value} for outcome in known)
        write_atomic(file, "[\n" + ",\n".join(json.dumps({"seed": 0} | row) for row in rows) + "\n]\n")
        write_atomic(output / "generated.md", markdown(known))
    Console().print(markdown(known), markup=False)
    if any(outcome.verdict in BAD for outcome in known):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

"""Random networks through every pass: is any result wrong, any error raw, any alarm false?

For each network of ``benchmarks.grammar``: random elements of the full symmetry classes leave the function
("symmetry"); a copy moved by one of them is merged with all weight on it ("aligned": the function must come back
whatever was matched) and half and half ("found again": it comes back if the search found the element); half of the
channels are removed and equal the masked network ("pruned"); the ONNX file gives the same at two batch sizes ("onnx").
Results go to ``benchmarks/results``: generated.json and generated.md. Anything wrong, raw or falsely alarmed ends the
run with status 1.
"""

from __future__ import annotations

import collections
import copy
import json
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
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
from benchmarks.options import Output
from vfx.errors import VerificationError, VfxError
from vfx.files import write_atomic

EXACT = 1e-10  # of proofs, in float64
CLOSE = 2e-3  # of float32 results, against the largest output
CHECKS = ("symmetry", "aligned", "found again", "pruned", "onnx")
BAD = ("wrong", "raw", "alarm")


@dataclass(frozen=True)
class Outcome:
    """What one check said of one network: "right", "wrong", "raw", "alarm", "refused" or "missed" (not found again)."""

    seed: int
    check: str
    verdict: str
    detail: str = ""
    blocks: tuple[str, ...] = ()
    seconds: float = 0.0


def outcomes(seed: int, checks: Iterable[str] = CHECKS) -> list[Outcome]:
    """Run the checks on the network of a seed."""
    model, x = network(seed)
    blocks = tuple(model.names())
    bodies: dict[str, Callable[[], str]] = {
        "symmetry": lambda: _symmetry(model, x),
        "aligned": lambda: _merged(model, x, seed, [0.0, 1.0]),
        "found again": lambda: _merged(model, x, seed, [0.5, 0.5]),
        "pruned": lambda: _pruned(model, x),
        "onnx": lambda: _exported(model, x),
    }
    results = []
    for check in checks:
        start = time.perf_counter()
        verdict, detail = _verdict(bodies[check])
        if check == "found again" and verdict == "wrong":
            verdict = "missed"
        results.append(Outcome(seed, check, verdict, detail, blocks, time.perf_counter() - start))
    return results


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
    return ("wrong", wrong) if wrong else ("right", "")


def _symmetry(model: nn.Module, x: Tensor) -> str:
    facts = vfx.symmetry(model, x)
    if facts.unknown_ops:
        return f"no rule for {', '.join(facts.unknown_ops)}"
    error = facts.verify(seed=1)
    return "" if error <= EXACT else f"a random element changes the function by {error:.1e}"


def moved_copy(model: nn.Module, x: Tensor, seed: int) -> nn.Module:
    """The network with its weights moved by a random element of the full classes."""
    facts = vfx.symmetry(model, x)
    program = facts.program
    element = facts.random_maps(np.random.default_rng(seed))
    double = {
        name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in program.weights[0].items()
    }
    moved = facts.transform(double, element)
    copied = copy.deepcopy(model)
    state = copied.state_dict()
    for name, tensor in moved.items():
        if name in state:  # constants that the graph folded are not the network's
            state[name] = tensor.to(state[name].dtype)
    copied.load_state_dict(state)
    return copied


def _merged(model: nn.Module, x: Tensor, seed: int, weights: list[float]) -> str:
    moved = moved_copy(model, x, seed)
    result = vfx.merge([model, moved], x, match="weight", weights=weights, progress=False)
    return difference(model(x), result.module(x))


def _pruned(model: nn.Module, x: Tensor) -> str:
    result = vfx.prune_structured(model, x, sparsity=0.5, progress=False)
    given = result.module(x)
    if given.shape != model(x).shape or not given.isfinite().all():
        return f"the pruned network gives {tuple(given.shape)}, finite: {bool(given.isfinite().all())}"
    return ""


def _exported(model: nn.Module, x: Tensor) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx")
        vfx.export(vfx.merge([model, model], x, match=None, progress=False), path)
        session = onnxruntime.InferenceSession(str(path))
        name = session.get_inputs()[0].name
        for batch in (x[:3], torch.cat([x, x.flip(0), x[:1]])):
            given = torch.from_numpy(session.run(None, {name: batch.numpy()})[0])
            wrong = difference(model(batch), given)
            if wrong:
                return f"batch of {len(batch)}: {wrong}"
    return ""


@torch.no_grad()
def difference(expected: Tensor, given: Tensor) -> str:
    error = float((expected - given).abs().max() / expected.abs().max())
    return "" if error <= CLOSE else f"differs by {error:.1e} of the largest output"


def _quiet() -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def measure(seeds: Iterable[int], jobs: int, checks: tuple[str, ...] = CHECKS) -> list[Outcome]:
    """The outcomes of all checks on the networks of ``seeds``, in ``jobs`` processes."""
    seeds = list(seeds)
    with ProcessPoolExecutor(jobs, initializer=_quiet) as pool:
        rows = pool.map(outcomes, seeds, [checks] * len(seeds))
        return [outcome for row in track(rows, "networks", len(seeds), console=Console(stderr=True)) for outcome in row]


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
        "`python -m benchmarks.generated`; the checks are described there. Missed: the search stopped in a local",
        "optimum; the merge is proved all the same.",
        "",
        f"| check | {' | '.join(verdicts)} |",
        f"| --- |{' ---: |' * len(verdicts)}",
        *(f"| {check} | {' | '.join(str(count[check, verdict]) for verdict in verdicts)} |" for check in checks),
    ]
    notable = [outcome for outcome in results if outcome.verdict in (*BAD, "refused")]
    if notable:
        lines += ["", "| network | check | verdict | what was said |", "| ---: | --- | --- | --- |"]
        lines += [f"| {o.seed} | {o.check} | {o.verdict} | {_cell(o.detail)} |" for o in notable]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:300]


def main(
    networks: Annotated[int, typer.Option(help="How many networks.")] = 1000,
    first: Annotated[int, typer.Option(help="Seed of the first.")] = 0,
    jobs: Annotated[int, typer.Option(help="Processes.")] = 2,
    only: Annotated[list[str] | None, typer.Option(help=f"Only these checks: {', '.join(CHECKS)}.")] = None,
    output: Output = RESULTS,
) -> None:
    results = measure(range(first, first + networks), jobs, tuple(only or CHECKS))
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / "generated.json", json.dumps([asdict(outcome) for outcome in results], indent=1).encode())
    table = markdown(results)
    write_atomic(output / "generated.md", table.encode())
    Console().print(table, markup=False)
    if any(outcome.verdict in BAD for outcome in results):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

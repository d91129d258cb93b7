"""All claims at a glance: what vfx promises, whether the committed results show it, and the command of each.

Nothing is measured here. Each claim reads the figures that its benchmark wrote into ``benchmarks/results`` and says
whether it holds there; where a target is missed it stands as "missed". The papers' own claims have a page of their own
(``reproduce``). Results go to ``benchmarks/results/README.md``; a test keeps the page what these lines make of the
figures.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import typer

from benchmarks.channel_peers import OURS, lead
from benchmarks.experiments import TABLES
from benchmarks.fashion import RESULTS
from benchmarks.masks import SAME_SIZE
from benchmarks.options import Output
from benchmarks.reproduce import verdict
from vfx.files import write_atomic

Json = Any
ZOO_ERROR = 1e-10
PAPERS = ("REPAIR", "RESCALE", "RESET")


class Reading(NamedTuple):
    """Whether a claim holds in the results, and the figures that show it."""

    holds: bool
    figures: str


@dataclass(frozen=True)
class Promise:
    """Something that vfx claims, the benchmark whose results show it, and how they are read."""

    text: str
    benchmark: str
    read: Callable[[Json], Reading]


def _symmetries(zoo: Json) -> Reading:
    verified = [line["verify_error"] for line in zoo.values() if line["verify_error"] is not None]
    right = sum(error < ZOO_ERROR for error in verified)
    figures = (
        f"{right} of {len(verified)} verified, largest error {max(verified):.0e}; {len(zoo) - len(verified)} captured"
    )
    return Reading(right == len(verified), figures)


def _moved_copies(networks: Json) -> Reading:
    groups = sum(line["weight"]["exact"] for line in networks.values())
    total = sum(line["groups"] for line in networks.values())
    return Reading(groups == total, f"{groups:,} of {total:,} groups of {len(networks)} networks")


def _moved_by_classes(rows: Json) -> Reading:
    cells = [(method, cell) for row in rows for method, cell in row["methods"].items()]
    errors = [cell["error"] for method, cell in cells if method != "none" and not method.endswith("permutations")]
    return Reading(max(errors) < 1e-9, f"largest error of the outputs {max(errors):.0e} over {len(rows)} networks")


def _smaller(networks: Json) -> Reading:
    ratios = ("0.25", "0.5", "0.75")
    errors = [line[ratio]["error"] for line in networks.values() for ratio in ratios if ratio in line]
    return Reading(
        max(errors) < 1e-6, f"{len(networks)} networks × {len(ratios)} ratios, largest error {max(errors):.0e}"
    )


def _generated(checks: Json) -> Reading:
    verdicts = Counter(check["verdict"] for check in checks)
    return Reading(not verdicts["wrong"] and not verdicts["raw"], _counted(verdicts) + f" of {len(checks):,} checks")


def _fuzzed(run: Json) -> Reading:
    return Reading(not run["faults"], f"{len(run['faults'])} faults in {run['cases']:,} cases for each reader")


def _killed(rows: Json) -> Reading:
    states = Counter(dict.fromkeys(("old", "new", "broken"), 0))
    for row in rows:
        for counts in row["files"].values():
            states.update(counts)
    return Reading(not states["broken"] and not any(row["stayed"] for row in rows), f"files: {_counted(states)}")


def _mutations(rows: Json) -> Reading:
    noticed = sum(row["control"] for row in rows)
    return Reading(noticed >= 0.95 * len(rows), f"{noticed} of {len(rows)}")


def _default_call(pairs: Json) -> Reading:
    behind = {name: pair["default"]["accuracy"] - max(pair["edges"]) for name, pair in pairs.items()}
    errors = {name: max(error for _, error in pair["default"]["gains"]) for name, pair in pairs.items()}
    level = all(behind[name] > -2 * errors[name] for name in behind)
    return Reading(
        level, "against the better edge " + ", ".join(f"{name} {gain:+.2f}" for name, gain in behind.items())
    )


def _wide(pairs: Json) -> Reading:
    cells = [cell for pair in pairs.values() for cell in _against_the_papers(pair["cells"])]
    ahead = sum(default > paper for default, paper in cells)
    least = min(default - paper for default, paper in cells)
    figures = f"ahead in {ahead} of {len(cells)} cells (three pairs of each network), least difference {least:+.2f}"
    return Reading(ahead == len(cells), figures)


def _against_the_papers(cells: Json) -> Iterator[tuple[float, float]]:
    """The default call and the best of the papers' normalizations, for each number of layers kept."""
    for name, cell in cells.items():
        way, _, preserve = name.partition("/")
        if way == "default":
            yield (
                cell["accuracy"],
                max(cells[f"{way}/{preserve}"]["accuracy"] for way in PAPERS if f"{way}/{preserve}" in cells),
            )


def _masks(networks: Json) -> Reading:
    shares = sorted({key.split("/")[-1] for line in networks.values() for key in line["cells"]})
    gains = [
        line["cells"][f"solved/{share}"]["accuracy"] - line["cells"][f"RESET / REPAIR/{share}"]["accuracy"]
        for line in networks.values()
        for share in shares
    ]
    return Reading(min(gains) > 0, f"{min(gains):+.2f} to {max(gains):+.2f} points in {len(gains)} cells")


def _channels(networks: Json) -> Reading:
    gains = [
        line["cells"][f"default (2,000)/{ratio}"]["accuracy"]
        - max(line["cells"][f"{score}, RESET / REPAIR/{ratio}"]["accuracy"] for score in ("magnitude", "taylor"))
        for line in networks.values()
        for ratio in ("0.25", "0.5", "0.75")
    ]
    return Reading(min(gains) > 0, f"{min(gains):+.2f} to {max(gains):+.2f} points in {len(gains)} cells")


def _supports(networks: Json) -> Reading:
    """The default masks beside the best of the peers' scores, all solved, at the same size where that is measured."""
    scores, gains = ("magnitude, global", "magnitude, layer", "wanda, row", "sparsegpt, layer"), []
    for line in networks.values():
        for name, cell in line["cells"].items():
            row, _, share = name.rpartition("/")
            named = [[f"{score}, {SAME_SIZE}/{share}", f"{score}/{share}"] for score in scores]
            peers = [next((line["cells"][key] for key in keys if key in line["cells"]), None) for keys in named]
            measured = [peer["accuracy"] for peer in peers if peer]
            if row == "default" and measured:
                gains.append(cell["accuracy"] - max(measured))
    return Reading(min(gains) > -0.25, f"{min(gains):+.2f} to {max(gains):+.2f} points in {len(gains)} cells")


def _channel_peers(networks: Json) -> Reading:
    """The default channels beside Torch-Pruning's, with our repair and without, at no more parameters."""
    leads = []
    for line in networks.values():
        cells = [cell for share in line["shares"].values() for name, cell in share.items() if name != OURS]
        leads += [lead(cell, line["labels"]) for cell in cells]
    points, ahead = [points for points, _ in leads], sum(points > error for points, error in leads)
    level = all(points >= -error for points, error in leads)
    span = f"{min(points):+.2f} to {max(points):+.2f} points in {len(leads)} cells"
    return Reading(level, f"{span}; ahead by more than the error in {ahead}")


def _crepe(networks: Json) -> Reading:
    solved = networks["crepe"]["cells"]["50 % of channels/reconstruct"]["cents"]
    dense = networks["crepe"]["dense"]["cents"]
    return Reading(solved <= dense + 10, f"{solved:.1f} cents against {dense:.1f} of the dense network")


def _minilm(networks: Json) -> Reading:
    cells, asked = networks["minilm"]["cells"], {25: 0.95, 50: 0.85}
    cosines = {share: cells.get(f"{share} % of channels/reconstruct", {"cosine": 0.0})["cosine"] for share in asked}
    figures = ", ".join(
        f"{share} %: {cosine:.3f}" if cosine else f"{share} %: not measured" for share, cosine in cosines.items()
    )
    return Reading(all(cosines[share] >= goal for share, goal in asked.items()), figures)


def _many(families: Json) -> Reading:
    margins = [
        cell["accuracy"] - min(family["edges"][: cell["edges"]])
        for family in families.values()
        for cell in family["cells"]
        if cell["normalize"] in ("least_squares", "default")
    ]
    figures = f"{min(margins):+.2f} to {max(margins):+.2f} points against the worst edge in {len(margins)} cells"
    return Reading(min(margins) > -1, figures)


def _learned(pairs: Json) -> Reading:
    targets = {"vit_digits": 0.02, "vit_fashion": 0.02, "gpt_text": 0.1}
    barriers = {name: _barriers(pair, "learned") for name, pair in pairs.items()}
    others = {name: _barriers(pair, "weight", "activation") for name, pair in pairs.items()}
    figures = [
        f"{pairs[name]['title']} {min(barriers[name]):.3f} (asked {target}; others {min(others[name]):.3f})"
        if barriers[name] else f"{pairs[name]['title']} not measured"
        for name, target in targets.items()
    ]  # fmt: skip
    reached = all(barriers[name] and min(barriers[name]) <= target for name, target in targets.items())
    return Reading(reached, "; ".join(figures))


def _barriers(pair: Json, *matches: str) -> list[float]:
    return [curve["loss_barrier"] for curve in pair["curves"] if curve["match"] in matches and not curve["normalize"]]


def _common_base(run: Json) -> Reading:
    averages = {row["name"]: row["average"] for row in run["rows"]}
    solved, peer = averages["own outputs"], averages["RegMean++"]
    return Reading(
        solved > peer, f"{solved:.1f} % against {peer:.1f} % (each network alone {averages['individual']:.1f} %)"
    )


def _solve_cost(run: Json) -> Reading:
    ratios = {name: max(line["ratios"]) for name, line in run["time"].items()}
    return Reading(max(ratios.values()) <= 4, ", ".join(f"{name}: {ratio:.1f} ×" for name, ratio in ratios.items()))


def _peaks(calls: Json) -> Reading:
    missed = [f"{name} {line['peak']:.2f}" for name, line in calls.items() if line["peak"] > line["target"]]
    met = f"{len(calls) - len(missed)} of {len(calls)} calls"
    return Reading(not missed, met + (f"; above theirs: {'; '.join(missed)}" if missed else ""))


def _latency(run: Json) -> Reading:
    lines = {(line["network"], line["form"], line["batch"]): line for line in run["latency"]}
    preserved = lines["vgg16 PFM 8", "ONNX Runtime", 64]
    merged = lines["vgg16 merged", "ONNX Runtime", 64]
    figures = (
        f"merged {merged['ratio']:.2f} ×, PFM 8/14 {preserved['ratio']:.2f} × for {preserved['flops']:.2f} × the FLOPs"
    )
    return Reading(merged["ratio"] <= 1.05 and preserved["ratio"] <= 1.05 * preserved["flops"], figures)


def _gpu(run: Json) -> Reading:
    gains = {line["name"]: line["processor"] / line["device"] for line in run["passes"]}
    return Reading(
        min(gains.values()) > 1, f"{min(gains.values()):.1f} to {max(gains.values()):.1f} × as fast as the processor"
    )


PROMISES = (
    Promise("the symmetries of public networks are found, and proved in float64", "zoo", _symmetries),
    Promise("a copy with permuted channels is matched without an error", "recovery", _moved_copies),
    Promise("a copy moved by its whole class merges into the network itself", "class_recovery", _moved_by_classes),
    Promise("a network with fewer channels equals the masked one", "pruning_zoo", _smaller),
    Promise("random networks go through every pass", "generated", _generated),
    Promise("damaged and hostile files are refused", "fuzz", _fuzzed),
    Promise("a killed command leaves each file old or new", "killed", _killed),
    Promise("the tests notice 95 % of wrong changes of the code", "mutations", _mutations),
    Promise("the default call is level with the better edge at one edge's parameters", "solving", _default_call),
    Promise("wide networks: the default call beats the papers' methods at the same layers kept", "headline", _wide),
    Promise("two to five networks merge into one, less than a point below the worst edge", "many", _many),
    Promise("learned matching removes the loss barrier of transformers", "transformers", _learned),
    Promise("networks of a common base: solving for own outputs beats RegMean++", "common_base", _common_base),
    Promise("masks: solving beats RESET and REPAIR", "masks", _masks),
    Promise("masks: the default is level with magnitude, Wanda and SparseGPT, all solved", "supports", _supports),
    Promise("channels: the default beats magnitude and Taylor with RESET or REPAIR", "folding", _channels),
    Promise("channels: the default is level with Torch-Pruning's, solved or not", "channel_peers", _channel_peers),
    Promise("CREPE keeps its pitch without half of its channels (10 cents)", "real", _crepe),
    Promise("MiniLM without 25 and 50 % of its channels: cosine 0.95 and 0.85", "real", _minilm),
    Promise("least squares takes at most four times the forwards of its data", "solving_cost", _solve_cost),
    Promise("peak memory of calls stays below their targets", "peaks", _peaks),
    Promise("ONNX Runtime, batch 64: merged at an edge's speed, PFM at its share of FLOPs", "bench", _latency),
    Promise("passes run on a GPU", "gpu", _gpu),
)  # fmt: skip


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _papers(folder: Path) -> Counter[str]:
    """How many of the papers' claims hold, fail, or are not told apart here."""
    counts: Counter[str] = Counter()
    for name, table in TABLES.items():
        file = folder / "reproduce" / f"{name}.json"
        if file.is_file():
            for pairs in json.loads(file.read_text()).values():
                counts.update(_outcome(verdict(claim, pairs)) for claim in table.claims)
    return counts


def _outcome(said: str) -> str:
    return next((word for word in ("holds", "fails") if word in said), "not told apart")


def glance(folder: Path) -> str:
    """The page: each promise with what the results in a folder say of it."""
    lines = ["# All claims at a glance", "", *str(__doc__).splitlines()[2:], ""]
    lines += ["| claim | here | figures | page | command |", "| --- | --- | --- | --- | --- |"]
    for promise in PROMISES:
        name = promise.benchmark
        reading = promise.read(json.loads((folder / f"{name}.json").read_text()))
        state = "holds" if reading.holds else "**missed**"
        lines.append(
            f"| {promise.text} | {state} | {reading.figures} | [{name}]({name}.md) | `python -m benchmarks.{name}` |"
        )
    lines += ["", "## The papers' claims", ""]
    lines.append(f"{_counted(_papers(folder))}: [all of them](reproduce/README.md), `python -m benchmarks.reproduce`.")
    return "\n".join([*lines, ""])


def main(output: Output = RESULTS) -> None:
    """Write the page of all claims from the results in a folder."""
    write_atomic(output / "README.md", glance(output))


if __name__ == "__main__":
    typer.run(main)

"""The papers' tables as data: for each the network, the rows, the columns, and what the paper claims with it.

VF: *Vanishing Feature* (CPAL 2025); RB: *Rethinking Model Re-Basin*; RD: *The Role of Data in Model Merging*. A cell
joins its row's and its column's arguments of ``vfx.merge``. Three more say how they come about: "samples", how many
calibration samples are read (a share of all); "independent", that a third network's statistics are the goal;
"recorded", that the goals were recorded in training mode. Every table ends with the default call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import vfx

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """The paper's sentence, and the cells (row, column) of which the first is said to be better than the second."""

    text: str
    better: tuple[str, str]
    worse: tuple[str, str]


@dataclass(frozen=True)
class Table:
    """One table of a paper: ``network`` names a recipe of ``benchmarks.train``."""

    title: str
    network: str
    rows: Mapping[str, Options]
    columns: Mapping[str, Options]
    claims: tuple[Claim, ...] = field(default=())


def _plain(normalize: str | vfx.Normalization | None, **options: Any) -> Options:
    return {"solve": None, "normalize": normalize, **options}


WEIGHT, ACTIVATION = ({"match": name, "classes": "permutation"} for name in ("weight", "activation"))
CCA, ZIPIT = {"match": "cca"}, {"match": "zipit"}
TRANSPORT: Options = {"match": "ot"}
SINKHORN: Options = {"match": vfx.OptimalTransport("sinkhorn", "weight")}
NORMALIZED = {"REPAIR": "repair", "RESCALE": "rescale", "Bias Cal.": "bias_calibration"}
VARIANTS = {"-": None, "REPAIR": "repair", "RESCALE": "rescale", "RESCALE (average)": "rescale_average"}
VARIANTS |= {"RESHIFT": "reshift"}
DEFAULT: Mapping[str, Options] = {"default": {}}
INDEPENDENT, RECORDED = {"independent": True}, {"recorded": True}


def _by_batch(method: str) -> Options:
    """No calibration: the statistics of each batch, at evaluation."""
    return _plain(vfx.Normalization(method, sweep="batch"))


def _cuts(depth: int, cuts: tuple[int, ...]) -> dict[str, Options]:
    return {f"PFM {cut}/{depth}": {"preserve": cut} for cut in cuts}


VGG, RESNET = _cuts(14, (0, 3, 6, 8, 12)), _cuts(20, (0, 6, 10, 13, 19))
BLOCKS: dict[str, Options] = {"PFM 0/6": {}} | {
    f"PFM {k + 1}/6 blocks": {"preserve": f"blocks.{k}"} for k in (1, 2, 3, 4)
}


def _normalized(match: Options) -> dict[str, Options]:
    """Direct averaging, and a matching with each normalization of plain networks."""
    columns = {"direct": _plain(None, match=None), "without": _plain(None, **match)}
    return {**columns, **{title: _plain(name, **match) for title, name in NORMALIZED.items()}, **DEFAULT}


def _reset(**matches: Options) -> dict[str, Options]:
    """Direct averaging, and matchings with and without RESET."""
    columns: dict[str, Options] = {"direct": _plain(None, match=None)}
    for title, match in matches.items():
        columns |= {f"{title}, without": _plain(None, **match), f"{title}, RESET": _plain("reset", **match)}
    return {**columns, **DEFAULT}


def _variants(network: str, number: str) -> Table:
    """RB's ablation of REPAIR, both matchings."""
    columns = {"WM": WEIGHT, "AM": ACTIVATION}
    rows: dict[str, Options] = {title: _plain(name) for title, name in VARIANTS.items()}
    claims = (
        Claim("RESCALE does at least as well as REPAIR", ("RESCALE", "AM"), ("REPAIR", "AM")),
        Claim("rescaling by layer averages is worse than by channels", ("RESCALE", "AM"), ("RESCALE (average)", "AM")),
        Claim("shifting alone (RESHIFT) does not repair", ("RESCALE", "AM"), ("RESHIFT", "AM")),
    )
    return Table(f"RB Table {number}", network, rows, columns, claims)


def _pfm_claims(column: str, rows: Mapping[str, Options], reference: str) -> tuple[Claim, ...]:
    first, *_, late, _ = rows
    return (
        Claim("keeping the first layers helps", (late, column), (first, column)),
        Claim(f"{column} repairs what matching alone leaves", (first, column), (first, reference)),
    )


TABLES: dict[str, Table] = {
    "vf_table1": Table(
        "VF Table 1: activation matching", "vgg16", VGG, _normalized(ACTIVATION),
        (*_pfm_claims("RESCALE", VGG, "without"),
         Claim("matching beats direct averaging", ("PFM 0/14", "without"), ("PFM 0/14", "direct")),
         Claim("bias calibration alone repairs most of it", ("PFM 0/14", "Bias Cal."), ("PFM 0/14", "without"))),
    ),
    "vf_table3": Table("VF Table 3: CCA", "vgg16", VGG, _normalized(CCA), _pfm_claims("RESCALE", VGG, "without")),
    "vf_table4": Table(
        "VF Table 4: CCA", "vgg16_bn", VGG, _reset(CCA=CCA), _pfm_claims("CCA, RESET", VGG, "CCA, without")
    ),
    "vf_table5": Table(
        "VF Table 5: optimal transport", "vit", BLOCKS,
        {"direct": _plain(None, match=None), "OT-acts": _plain(None, **TRANSPORT),
         "Sinkhorn by weights": _plain(None, **SINKHORN),
         "Sinkhorn by weights, REPAIR": _plain("repair", **SINKHORN), **DEFAULT},
        (Claim("transport beats direct averaging", ("PFM 0/6", "OT-acts"), ("PFM 0/6", "direct")),
         Claim("keeping the first blocks helps", ("PFM 4/6 blocks", "OT-acts"), ("PFM 0/6", "OT-acts"))),
    ),
    "vf_table6": Table("VF Table 6: ZipIt!", "vgg16", VGG, _normalized(ZIPIT), _pfm_claims("RESCALE", VGG, "without")),
    "vf_table7": Table(
        "VF Table 7: activation matching and ZipIt!", "resnet20_bn", RESNET, _reset(AM=ACTIVATION, ZipIt=ZIPIT),
        _pfm_claims("AM, RESET", RESNET, "AM, without"),
    ),
    "vf_table8": Table(
        "VF Table 8: activation matching and ZipIt!", "vgg16_bn", VGG, _reset(AM=ACTIVATION, ZipIt=ZIPIT),
        _pfm_claims("AM, RESET", VGG, "AM, without"),
    ),
    "rb_table4": _variants("vgg16", "4: VGG16"),
    "rb_table5": _variants("vgg11", "5: VGG11"),
    "rb_table6": _variants("resnet20_plain", "6: plain ResNet20"),
    "rb_table7": _variants("resnet20_fixup", "7: Fixup ResNet20"),
    "rb_table8": Table(
        "RB Table 8: the statistics of an independent network as the goal", "vgg16",
        {"WM": WEIGHT, "AM": ACTIVATION},
        {"without": _plain(None), "RESCALE": _plain("rescale"),
         "RESCALE, independent": _plain("rescale", **INDEPENDENT),
         "RESCALE (average), independent": _plain("rescale_average", **INDEPENDENT)},
        (Claim("an independent network's statistics repair, too", ("WM", "RESCALE, independent"), ("WM", "without")),
         Claim("of an independent network layer averages serve better than channels",
               ("WM", "RESCALE (average), independent"), ("WM", "RESCALE, independent"))),
    ),
    "rb_table9": Table(
        "RB Table 9: normalization layer by layer (exact), on uncorrected activations, and in training mode",
        "vgg16", {"REPAIR": {"method": "repair"}, "RESCALE": {"method": "rescale"}},
        {sweep: {"sweep": sweep, "solve": None, **ACTIVATION} for sweep in ("uncorrected", "exact", "train")},
        (Claim("layer by layer is at least as good for REPAIR", ("REPAIR", "exact"), ("REPAIR", "uncorrected")),),
    ),
    "rb_table10": Table(
        "RB Table 10: REPAIR before and behind the activation", "vgg16",
        {"without matching": {"match": None}, "WM": WEIGHT},
        {"without": _plain(None), "before": _plain("repair"),
         "behind": _plain(vfx.Normalization("repair", site="activation"))},
        (Claim("before the activation is better than behind it", ("WM", "before"), ("WM", "behind")),),
    ),
    "rb_table11": Table(
        "RB Table 11: RESET without calibration data", "vgg16_bn", {"WM": WEIGHT, "AM": ACTIVATION},
        {"without": _plain(None), "RESET": _plain("reset"), "RESET by batch": _by_batch("reset")},
        (Claim("calibration is better than statistics of batches", ("WM", "RESET"), ("WM", "RESET by batch")),
         Claim("statistics of batches repair, too", ("WM", "RESET by batch"), ("WM", "without"))),
    ),
    "rb_table12": Table(
        "RB Table 12: REPAIR and RESCALE with LayerNorm, with and without calibration data", "vgg16_ln",
        {"WM": WEIGHT, "AM": ACTIVATION},
        {"without": _plain(None), "REPAIR": _plain("repair"), "RESCALE": _plain("rescale"),
         "REPAIR by batch": {**_by_batch("repair"), **RECORDED},
         "RESCALE by batch": {**_by_batch("rescale"), **RECORDED}},
        (Claim("REPAIR is at least as good as RESCALE", ("AM", "REPAIR"), ("AM", "RESCALE")),
         Claim("calibration is better than statistics of batches", ("AM", "REPAIR"), ("AM", "REPAIR by batch")),
         Claim("statistics of batches repair, too", ("AM", "REPAIR by batch"), ("AM", "without"))),
    ),
    "rd_figure1": Table(
        "RD Figure 1, its axis of amount: how much data matching and normalization read", "vgg16_bn",
        {f"{share:.0%}": {"samples": share} for share in (0.02, 0.05, 0.25, 1.0)},
        {"WM, RESET": _plain("reset", **WEIGHT), "AM, without": _plain(None, **ACTIVATION),
         "AM, RESET": _plain("reset", **ACTIVATION), **DEFAULT},
        (Claim("data act through the normalization", ("100%", "WM, RESET"), ("2%", "WM, RESET")),
         Claim("more data help matching, without normalization", ("100%", "AM, without"), ("2%", "AM, without"))),
    ),
}  # fmt: skip


def options_of(row: Options, column: Options) -> dict[str, Any]:
    """The arguments of one cell's ``vfx.merge``; a method in the row is applied with the sweep in the column."""
    options = {**row, **column}
    if "sweep" in options:
        options["normalize"] = vfx.Normalization(options.pop("method"), sweep=options.pop("sweep"))
    return options

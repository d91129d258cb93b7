"""What the measures say, in a few sentences: the first layer where features vanish, and what to try.

The first of these findings that applies is the verdict; ε is the unsmoothed vanishing bound, L the last layer:

=====================  ==========================================================================================
not finite             a layer or the output holds NaN or infinite values
features vanish        ε(l) < 0.5 from some layer on, and offsets take over: ‖h‖/E‖g‖ at L over 2 times the edges'
features shrink        ε(l) < 0.5 from some layer on, but offsets shrink alike: rank order survives, confidence is low
offset dominates       features stay, but ‖h‖/E‖g‖ at L is over 2 times the edges'
variance collapse      features stay, but the variance ratio of some layer is below 0.25 (half the deviation)
variance explosion     features stay, but the variance ratio of some layer is above 4 (twice the deviation)
healthy                none of these
=====================  ==========================================================================================

PFM is advised with the fewest layers l behind which at least half of the feature survives: r(L)/r(l) ≥ 0.5 for feature
ratios r, r(0) = 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vfx.diagnosis.rows import LayerRow, Number

VANISHED = 0.5
DOMINATED = 2.0
COLLAPSED, EXPLODED = 0.25, 4.0


@dataclass(frozen=True)
class Verdict:
    """``kind`` is one of the module's findings, ``number`` and ``layer`` the first layer it holds for (or None)."""

    kind: str
    number: int | None
    layer: str | None
    explanation: str
    remedies: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        return self.kind == "healthy"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "remedies": list(self.remedies), "text": str(self)}

    def __str__(self) -> str:
        text = f"verdict: {self.kind}. {self.explanation}"
        return text + (" Try: " + "; ".join(self.remedies) + "." if self.remedies else "")


def judge(
    rows: Sequence[LayerRow], *, batch_norm: bool, outputs: Sequence[Number] = (), choices: Mapping[str, Any] = {}
) -> Verdict:
    """The verdict on a network's rows. ``outputs`` are statistics of its logits, ``choices`` what a merge has done."""
    chain = [row for row in rows if not row.shortcut]
    measured = [row for row in chain if row.measured]
    if not measured:
        return Verdict("healthy", None, None, "Every layer is the edges' own: nothing was merged.")
    broken = _not_finite(measured, outputs)
    if broken is not None:
        return broken
    share = measured[-1].offset_share
    dominated = share is not None and share > DOMINATED
    vanished = next((row for row in measured if row.bound is not None and row.bound < VANISHED), None)
    if vanished is not None:
        return _vanished(chain, measured, vanished, dominated, batch_norm, choices)
    if dominated:
        return _dominated(measured[-1], batch_norm, choices)
    return _variance(measured, batch_norm, choices) or _healthy(measured)


def _not_finite(measured: Sequence[LayerRow], outputs: Sequence[Number]) -> Verdict | None:
    bad = lambda values: any(x is not None and not math.isfinite(x) for x in values)  # noqa: E731
    row = next((row for row in measured if bad((row.feature, row.offset, row.variance, row.activation_mean))), None)
    if row is not None:
        explanation = f"Values of layer {_name(row)} are NaN or infinite."
        return Verdict("not finite", row.number, row.layer, explanation, ("merge in float32 or float64",))
    if bad(outputs):
        return Verdict("not finite", None, None, "The outputs hold NaN or infinite values.")
    return None


def _vanished(
    chain: Sequence[LayerRow],
    measured: Sequence[LayerRow],
    first: LayerRow,
    dominated: bool,
    batch_norm: bool,
    choices: Mapping[str, Any],
) -> Verdict:
    last = measured[-1]
    start = (
        f"From layer {_name(first)} on the feature E‖g‖ stays below {VANISHED:g} of the edges' "
        f"({_number(first.feature_ratio)} there, {_number(last.feature_ratio)} at the output)"
    )
    share = _number(last.offset_share)
    remedies = [*_alignment(choices), *_normalization(batch_norm, choices, bias=dominated)]
    if dominated:
        remedies += _preserving(chain)
        explanation = f"{start}, while the offset weighs {share} times as much as in the edges."
        return Verdict("features vanish", first.number, first.layer, explanation, tuple(remedies))
    explanation = (
        f"{start}, but the offset shrinks with it ({share} times its weight in the edges): the outputs keep their "
        "order and lose confidence."
    )
    return Verdict("features shrink", first.number, first.layer, explanation, (*remedies, *_preserving(chain)))


def _dominated(last: LayerRow, batch_norm: bool, choices: Mapping[str, Any]) -> Verdict:
    explanation = (
        f"Features stay ({_number(last.feature_ratio)} of the edges' at layer {_name(last)}), but the offset ‖h‖ "
        f"weighs {_number(last.offset_share)} times as much against them as in the edges."
    )
    remedies = [*_alignment(choices), *_normalization(batch_norm, choices, bias=True)]
    return Verdict("offset dominates", last.number, last.layer, explanation, tuple(remedies))


def _variance(measured: Sequence[LayerRow], batch_norm: bool, choices: Mapping[str, Any]) -> Verdict | None:
    ratios = [(row, row.variance_ratio) for row in measured if row.variance_ratio is not None]
    for row, value in ratios:
        if value < COLLAPSED:
            explanation = (
                f"Features stay, but the output of layer {_name(row)} varies too little between samples: variance "
                f"ratio {_number(value)}."
            )
            remedies = [*_alignment(choices), *_normalization(batch_norm, choices, bias=False)]
            return Verdict("variance collapse", row.number, row.layer, explanation, tuple(remedies))
    for row, value in ratios:
        if value > EXPLODED:
            explanation = (
                f"The output of layer {_name(row)} varies more than the edges': variance ratio {_number(value)}. "
                "Statistics from skewed calibration data do that."
            )
            remedy = "calibrate on other data: vfx.select(data, n, strategy='random')"
            return Verdict("variance explosion", row.number, row.layer, explanation, (remedy,))
    return None


def _healthy(measured: Sequence[LayerRow]) -> Verdict:
    ratios = [row.feature_ratio for row in measured if row.feature_ratio is not None]
    if not ratios:
        return Verdict("healthy", None, None, "The edges carry no features at any merged layer: nothing could vanish.")
    explanation = (
        f"The feature E‖g‖ keeps {min(ratios):.2f} to {max(ratios):.2f} of the edges' over the merged layers, "
        f"{ratios[-1]:.2f} at the last; offsets and variances are in proportion."
    )
    return Verdict("healthy", None, None, explanation)


def _alignment(choices: Mapping[str, Any]) -> list[str]:
    return ["align the edges first: match='activation'"] if choices.get("aligned") is False else []


def _normalization(batch_norm: bool, choices: Mapping[str, Any], bias: bool) -> list[str]:
    """Methods that were not run already."""
    names = ["reset"] if batch_norm else ["rescale", "repair", *(["bias_calibration"] if bias else [])]
    done = choices.get("normalize")
    names = [name for name in names if name != done]
    text = " or ".join(f"normalize='{name}'" for name in names)
    return [] if not names or done in ("reset", "rescale", "repair") else [text]


def _preserving(chain: Sequence[LayerRow]) -> list[str]:
    """PFM with the fewest layers behind which half of the feature survives, if that is less than all of them."""
    ratios = [1.0, *(1.0 if row.state == "preserved" else row.feature_ratio for row in chain)]
    last = next((value for value in reversed(ratios) if value is not None), None)
    for number, value in enumerate(ratios):
        if value is not None and last is not None and last >= VANISHED * value:
            already = sum(row.state in ("preserved", "joined") for row in chain)
            if already < number < len(chain):
                return [f"keep the first {number} layers of each edge: preserve={number}"]
            return []
    return []


def _name(row: LayerRow) -> str:
    return f"{row.number} ({row.layer})"


def _number(value: Number) -> str:
    return "–" if value is None else f"{value:.2g}"

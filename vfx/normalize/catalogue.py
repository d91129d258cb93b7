"""The catalogue of normalizations: one line each, and what a user can ask of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from vfx.analyse.layer_view import batch_norms
from vfx.analyse.layers import Choice, Join
from vfx.arguments import check_fields
from vfx.errors import ArgumentError
from vfx.normalize.biases import Direction
from vfx.program import Program


class Method(NamedTuple):
    """What a normalization needs: calibration ``data``, ``goals`` (the edges' layer statistics), BatchNorm or none.

    ``norm``: True if only networks with BatchNorm, False if only those without have a use for it, None for all.
    ``tried``: whether "auto" tries it.
    """

    data: bool
    goals: bool
    norm: bool | None
    tried: bool
    summary: str


METHODS: Mapping[str, Method] = {
    "repair": Method(True, True, False, True, "(x − μ_α)/σ_α · σ̄ + μ̄"),
    "rescale": Method(True, True, False, True, "x/σ_α · σ̄"),
    "rescale_average": Method(True, True, False, True, "x/σ_α · mean of σ̄ over the layer"),
    "reshift": Method(True, True, False, False, "x − μ_α + μ̄ (an ablation that ruins the papers' networks)"),
    "reset": Method(True, False, True, True, "BatchNorm's running statistics recomputed"),
    "bias_calibration": Method(False, False, None, True, "b_l ← Σ αᵢ^l b_i"),
    "bias_removal": Method(False, False, None, True, "b ← 0 in the last or first k layers"),
    "rescale_weights": Method(False, False, None, True, "|θ_α| brought to the edges' mean magnitude"),
}
BEHIND = "repair, activation"  # what "auto" calls it


@dataclass(frozen=True)
class Normalization:
    """A normalization with its options; a name alone stands for the defaults.

    ``method``: "auto", or one of ``METHODS``. ``layers``: numbers, names or globs of the layers that are normalised;
    None: every conv and linear layer but shortcuts and classifier heads (as the papers do), every BatchNorm for RESET.
    ``site``: before or behind the activation function. ``sweep``: "exact" (layer by layer), "train" and "uncorrected"
    (to compare with, ``vfx.statistics.frontier``), "batch" (by the statistics of each batch at evaluation, no data).
    ``count`` and ``direction``: of bias removal; what is None is chosen on held-out calibration data (without data: the
    last 5 layers). ``memory_limit``: bytes of activations that an exact sweep keeps in memory, the rest waits on disk.
    Raises ArgumentError.
    """

    method: str = "auto"
    layers: Choice = None
    site: Join = "preactivation"
    sweep: Literal["exact", "train", "uncorrected", "batch"] = "exact"
    count: int | None = None
    direction: Direction | None = None
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.method != "auto" and self.method not in METHODS:
            methods = ", ".join(METHODS)
            raise ArgumentError(f"normalize={self.method!r} is unknown; choose one of {methods}, None or 'auto'")
        if self.sweep == "batch" and (self.method not in METHODS or not METHODS[self.method].data or self.behind):
            raise ArgumentError("sweep='batch' normalises before the activation by repair, rescale or reset; name one")
        if self.method == "reset" and self.behind:
            raise ArgumentError("site='activation' is for repair, rescale and reshift: RESET acts on BatchNorms")

    @property
    def behind(self) -> bool:
        """Whether it acts behind the activation functions."""
        return self.site == "activation"

    @property
    def needs_goals(self) -> bool:
        return METHODS[self.method].goals

    @property
    def needs_data(self) -> bool:
        return METHODS[self.method].data and self.sweep != "batch"

    @property
    def chooses(self) -> bool:
        """Whether bias removal has something to choose on held-out data."""
        return self.method == "bias_removal" and (self.count is None or self.direction is None)

    def to_dict(self) -> dict[str, Any]:
        """What is not the default, for reports."""
        default = Normalization()
        names = ("layers", "site", "sweep", "count", "direction", "memory_limit")
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(default, name)}


def normalization(normalize: str | Normalization | None, data: bool) -> Normalization | None:
    """The normalization that is asked for, checked against the data at hand; None for none, and "auto" without data.

    Raises ArgumentError.
    """
    if normalize is None:
        return None
    asked = Normalization(normalize) if isinstance(normalize, str) else normalize
    if asked.method == "auto":
        return asked if data else None
    if asked.needs_data and not data:
        raise ArgumentError(f"normalize={asked.method!r} runs the merged network on data; give data=")
    return asked


def candidates(asked: Normalization, program: Program) -> dict[str, Normalization | None]:
    """What "auto" tries: none at all, and every method of use on this network, with the options of ``asked``.

    REPAIR is tried behind the activation too, unless ``asked`` says where.

    With BatchNorm behind some layers and none behind others, REPAIR and its kin reset the former; with BatchNorm behind
    all of them they are RESET.
    """
    has_norm = bool(batch_norms(program))
    use = {name: method for name, method in METHODS.items() if method.tried and method.norm in (None, has_norm)}
    methods: dict[str, Normalization | None] = {"none": None}
    methods |= {name: replace(asked, method=name) for name in use if not (asked.behind and not use[name].goals)}
    return (
        methods
        if asked.behind or "repair" not in use
        else methods | {BEHIND: replace(asked, method="repair", site="activation")}
    )

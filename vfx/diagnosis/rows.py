"""One row for each layer: what the pass over the data saw, as ratios to the edges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from vfx.diagnosis.measures import GAMMA, mean, ratio, vanishing_bound
from vfx.diagnosis.observe import Observer, SilencedUnits
from vfx.diagnosis.taps import Key, LayerTap
from vfx.statistics.moments import Moments

Number = float | None


@dataclass(frozen=True)
class LayerRow:
    """One layer of the merged network beside the same layer of each edge (tuples).

    ``state``: "merged"; "joined", where preserved branches are averaged; "preserved", which has no merged values;
    "absent", which the merged network does not have. Features and offsets are E‖g‖ and ‖h‖ of what the layer hands on
    (behind its activation, where it has one); output statistics are over all positions and channels in front of it.
    """

    number: int
    layer: str
    operator: str
    shortcut: bool
    state: str
    feature: Number
    offset: Number
    edge_features: tuple[Number, ...]
    edge_offsets: tuple[Number, ...]
    feature_ratio: Number
    bound: Number
    smoothed_bound: Number
    variance: Number
    edge_variances: tuple[Number, ...]
    variance_ratio: Number
    output_mean: Number
    output_std: Number
    edge_output_means: tuple[Number, ...]
    edge_output_stds: tuple[Number, ...]
    activation_mean: Number
    activation_std: Number
    edge_activation_means: tuple[Number, ...]
    edge_activation_stds: tuple[Number, ...]
    zero_share: Number
    edge_zero_shares: tuple[Number, ...]
    silenced: Number
    magnitude: Number
    edge_magnitudes: tuple[Number, ...]
    magnitude_ratio: Number

    @property
    def measured(self) -> bool:
        """Whether the merged network has a value of its own here."""
        return self.state in ("merged", "joined")

    @property
    def offset_share(self) -> Number:
        """‖h‖ / E‖g‖ in the merged network over the same in the edges."""
        merged_share = ratio(self.offset, [self.feature])
        return ratio(merged_share, [ratio(h, [g]) for h, g in zip(self.edge_offsets, self.edge_features)])

    def record(self) -> dict[str, Any]:
        """The row by column, one for each edge behind ``edge_…`` (edges from 0); not finite is None."""
        columns: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                name = field.name.removeprefix("edge_").removesuffix("s")
                columns |= {f"edge{index}_{name}": finite(item) for index, item in enumerate(value)}
            else:
                columns[field.name] = finite(value)
        return columns


def finite(value: Any) -> Any:
    """A number as JSON can hold it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def layer_rows(
    merged: Observer, edges: Sequence[Observer], pairs: Sequence[Mapping[Key, SilencedUnits]], preserved: set[str]
) -> tuple[LayerRow, ...]:
    """Rows in the edges' order of layers, with the bounds filled in from the last to the first."""
    rows = [_values(key, tap, merged, edges, pairs, preserved) for key, tap in edges[0].taps.items()]
    chain = [row for row in rows if not row["shortcut"]]
    # a preserved layer hands on what the edges do
    norms = [1.0 if row["state"] == "preserved" else row["feature_ratio"] for row in chain]
    for name, gamma in (("bound", None), ("smoothed_bound", GAMMA)):
        for row, value in zip(chain, vanishing_bound(norms, gamma)):
            row[name] = value
    return tuple(LayerRow(**row) for row in rows)


def _values(
    key: Key, tap: LayerTap, merged: Observer, edges: Sequence[Observer], pairs: Any, preserved: set[str]
) -> dict[str, Any]:
    merged_layer, seen = merged.layers.get(key), [edge.layers[key] for edge in edges]
    there = merged.taps.get(key)
    state = "absent" if there is None else "joined" if there.joined else "merged"
    if there is None and tap.layer.fqn in preserved:
        state = "preserved"
    values: dict[str, Any] = {
        "number": tap.layer.number,
        "layer": tap.layer.fqn,
        "operator": tap.layer.operator.removeprefix("aten."),
        "shortcut": tap.layer.shortcut,
        "state": state,
        "bound": None,
        "smoothed_bound": None,
        "silenced": mean([pair[key].share for pair in pairs if key in pair]),
    }
    for name, read in _READ.items():
        values[name] = read(merged_layer) if merged_layer is not None else None
        values[f"edge_{name}s"] = tuple(read(layer) for layer in seen)
    values["magnitude"] = _magnitude(merged, there)
    values["edge_magnitudes"] = tuple(_magnitude(edge, tap) for edge in edges)
    for name, source in (
        ("feature_ratio", "feature"),
        ("variance_ratio", "variance"),
        ("magnitude_ratio", "magnitude"),
    ):
        values[name] = ratio(values[source], values[f"edge_{source}s"])
    return values


def _magnitude(observer: Observer, tap: LayerTap | None) -> Number:
    """Mean |θ| of a layer's weight."""
    if tap is None or tap.weight is None or not observer.weights[tap.weight].numel():
        return None
    return float(observer.weights[tap.weight].detach().abs().mean(dtype=torch.float64))


def overall(moments: Moments | None) -> tuple[Number, Number]:
    """Mean and standard deviation over all values of all channels, which have equally many."""
    if moments is None or not moments.count or not len(moments.mean):
        return None, None
    variance = (moments.std**2).mean() + moments.mean.var(unbiased=False)
    return float(moments.mean.mean()), float(variance.sqrt())


_READ: dict[str, Any] = {
    "feature": lambda layer: layer.feature if layer.samples else None,
    "offset": lambda layer: layer.offset if layer.samples else None,
    "variance": lambda layer: layer.variance,
    "output_mean": lambda layer: overall(layer.output)[0],
    "output_std": lambda layer: overall(layer.output)[1],
    "activation_mean": lambda layer: overall(layer.activation)[0],
    "activation_std": lambda layer: overall(layer.activation)[1],
    "zero_share": lambda layer: layer.zero_share,
}

"""Reconstruction on small networks with one hazard each: nothing fails, and no layer gets further from its goal."""

from __future__ import annotations

import pytest
import torch
from micro_models import MICRO, Micro
from torch import Tensor
from vfx.passes.interpolate import Interpolate
from vfx.passes.reconstruct import Reconstruct

from vfx.api import layers, prune_structured, trace
from vfx.errors import ArgumentError, PassError
from vfx.program import Program

SAMPLE = [*MICRO[::5], *(m for m in MICRO if m.name in ("grouped_queries", "dynamic_convolution"))]


def _edges(micro: Micro) -> tuple[Program, list[tuple[Tensor, ...]]]:
    inputs, models = micro.inputs(), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(micro.build().eval())
    generator = torch.Generator().manual_seed(0)
    noise = (0.1 * torch.randn(x.shape, generator=generator) if x.is_floating_point() else 0 for x in inputs)
    return trace(models, inputs), [tuple(torch.cat([x, x + n]) for x, n in zip(inputs, noise))]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("micro", SAMPLE, ids=lambda micro: micro.name)
def test_networks_with_hazards_are_solved(micro: Micro) -> None:
    program, data = _edges(micro)
    average = Interpolate()(program)
    done = Reconstruct(program, data, progress=False).run(average)
    result = done.program
    assert all(t.isfinite().all() for t in result.weights[0].values() if t.is_floating_point())
    for layer in done.record:
        assert layer.after <= 1.01 * layer.before + 1e-5, layer
    count = len(layers(program))
    if count:
        edge = Reconstruct(program, data, follow=count, follow_edge=1, progress=False)(average)
        assert edge.weights[0].keys() == average.weights[0].keys()
    try:
        small = prune_structured(
            program.select(0), sparsity=0.5, data=data, solve="least_squares", verify=False, progress=False
        )
    except (ArgumentError, PassError):  # what cannot be resized, which other tests are about
        return
    assert all(t.isfinite().all() for t in small.program.weights[0].values() if t.is_floating_point())

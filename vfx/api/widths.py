"""Networks of different widths, brought to the shapes of the first before they are merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from vfx.analyse.symmetry import symmetry as infer_symmetry
from vfx.api.normalizing import reads_for, without_batch_norm
from vfx.api.tracing import program_of
from vfx.checks import check_edges
from vfx.errors import ArgumentError
from vfx.match.catalogue import matcher
from vfx.match.matcher import Matcher
from vfx.match.transport import OptimalTransport
from vfx.normalize.catalogue import Normalization, normalization
from vfx.report import Stopwatch
from vfx.statistics.labels import counted
from vfx.widths import Carried, to_first_width


def one_width(
    models: Sequence[nn.Module],
    example_inputs: Any,
    data: Any,
    match: str | Matcher | None,
    normalize: str | Normalization | None,
    preserve: int | str,
    max_samples: int | None,
    verify: bool,
    device: Any,
    progress: bool,
    watch: Stopwatch,
) -> tuple[Carried, Normalization | None]:
    """Networks of different widths in the shapes of the first, and the normalization to run."""
    finder = matcher(match) if match != "auto" else None
    if not isinstance(finder, OptimalTransport):
        check_edges(models)  # names the tensor
        raise ArgumentError("only match='ot' merges edges of different widths")
    if preserve != 0:
        raise ArgumentError(f"preserve={preserve!r}: layers can be preserved where the edges are of one width")
    if example_inputs is None:
        raise ArgumentError("example_inputs are needed to capture a model")
    with watch("trace"):
        captured = [program_of(model, example_inputs) for model in models]
    asked = normalization(normalize, data is not None)
    folded = [without_batch_norm(program, asked, verify) for program in captured]
    asked = folded[0][1]
    programs = [program if device is None else program.to(device) for program, _ in folded]
    data = counted(data, len(programs[0].signature.inputs))
    layers = "layers" in reads_for(asked, None, programs[0])
    with watch("symmetry"):
        facts = [infer_symmetry(program) for program in programs]
    with watch("match"):
        options: dict[str, Any] = {"max_samples": max_samples, "device": device, "progress": progress}
        carried = to_first_width(programs, facts, finder, data, layers=layers, **options)
    return carried, asked

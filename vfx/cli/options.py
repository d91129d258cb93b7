"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vfx.cli.keywords import option_of
from vfx.options import Reading, Rewriting

MODELS = "torchvision:NAME, timm:NAME, hf:DIR, vfx:NAME, package.module:factory or ./file.py:factory"

Model = Annotated[
    str, typer.Option("--model", "-m", help=f"Constructor: {MODELS}, with options as in vfx:vgg16?width=0.25.")
]
Models = Annotated[
    list[str],
    typer.Option(
        "--model",
        "-m",
        help=f"Constructor: {MODELS}, with options as in vfx:vgg16?width=0.25. Given once for each checkpoint: that "
        "network's own, where widths or heads differ.",
    ),
]
Arguments = Annotated[
    list[str], typer.Option("--arg", "-a", help="Constructor argument key=value (value in JSON), repeatable.")
]
Entry = Annotated[
    str | None,
    typer.Option(
        help="Entry of the checkpoints to take, e.g. ema, or how the names of its tensors begin, e.g. teacher."
    ),
]
Inputs = Annotated[
    list[str],
    typer.Option(
        "--input",
        "-i",
        help="Shape of one sample, e.g. 3x224x224; name=16:1000 is a keyword argument of integers below 1000 "
        "(name=16:ones of ones). Repeatable. Default: what torchvision, timm or the directory says of the model.",
    ),
]
Data = Annotated[str | None, option_of(Reading, "data")]
MatchArguments = Annotated[
    list[str], typer.Option("--match-arg", help="Option of the matching method, e.g. iterations=50; repeatable.")
]
Evaluate = Annotated[
    str | None,
    typer.Option("--evaluate", help="Measure what comes out, and what went in, on these data; named as for --data."),
]
Outputs = Annotated[list[str] | None, option_of(Rewriting, "outputs")]
Out = Annotated[
    list[Path] | None, typer.Option("--out", "-o", help="Result: .onnx, .safetensors, .pt2 or .aoti; repeatable.")
]
Chosen = Annotated[
    list[str] | None,
    typer.Option("--layers", help="Layers to normalise: numbers, names or globs, repeatable; default: all but heads."),
]
Site = Annotated[str, typer.Option(help="Normalise before or behind the activation: preactivation or activation.")]
Sweep = Annotated[
    str, typer.Option(help="Statistics of the merged network: exact (layer by layer), train, uncorrected or batch.")
]
Memory = Annotated[
    int | None, typer.Option(help="Bytes of activations an exact sweep keeps in memory; the rest waits on disk.")
]
Samples = Annotated[int | None, option_of(Reading, "max_samples")]
Seed = Annotated[int, option_of(Reading, "seed")]
Device = Annotated[str | None, option_of(Rewriting, "device")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the report as JSON; - is standard output.")]
Csv = Annotated[Path | None, typer.Option("--csv", help="Write the rows as CSV; - is standard output.")]
Draw = Annotated[Path | None, typer.Option("--draw", help="Write the picture (.png).")]

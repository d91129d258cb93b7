"""Options that several benchmarks share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Checkpoints = Annotated[Path, typer.Option(help="Folder of the trained Fashion-MNIST pairs.")]
DataFolder = Annotated[Path, typer.Option(help="Folder of Fashion-MNIST: the idx files, or torchvision's root.")]
Output = Annotated[Path, typer.Option(help="Folder the results are written to.")]
Cache = Annotated[Path, typer.Option(help="Folder of the networks trained here.")]
Samples = Annotated[int | None, typer.Option(help="Test images to use (default: all).")]
Fresh = Annotated[bool, typer.Option(help="Measure again what the results hold already.")]
Render = Annotated[bool, typer.Option(help="Only rewrite the tables and the plots.")]
Device = Annotated[str, typer.Option(help="Where networks run: cpu, cuda.")]

"""The application that every command registers with, and its entry point."""

from __future__ import annotations

import sys
import warnings
from typing import TextIO

import typer
from rich.console import Console

from vfx.errors import CheckpointNote, VfxError

app = typer.Typer(
    help="Merge and prune trained networks without retraining.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point: vfx's own errors end with a message, not a traceback, and its notes are a line each."""
    others = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, CheckpointNote):
            Console(stderr=True, soft_wrap=True, markup=False, highlight=False).print(f"note: {message}")
        else:
            others(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        app(prog_name="vfx")
    except VfxError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]{type(error).__name__}:[/] ", end="")
        Console(stderr=True, soft_wrap=True, markup=False).print(str(error))
        sys.exit(1)
    finally:
        warnings.showwarning = others

"""The application that every command registers with, and its entry point."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from vfx.errors import VfxError

app = typer.Typer(
    help="Merge and prune trained networks without retraining.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point: vfx's own errors end with a message, not a traceback."""
    try:
        app(prog_name="vfx")
    except VfxError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]{type(error).__name__}:[/] ", end="")
        Console(stderr=True, soft_wrap=True, markup=False).print(str(error))
        sys.exit(1)

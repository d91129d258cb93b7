"""The application that every command registers with, and its entry point."""

from __future__ import annotations

import sys
import traceback
import warnings
from typing import TextIO

import typer
from rich.console import Console

from vfx.errors import CheckpointNote, VfxError

DEBUG = "--debug"

app = typer.Typer(
    help="Merge and prune trained networks without retraining. With --debug an error shows its whole origin.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point: vfx's own errors end with a message, and its notes are a line each.

    With ``--debug`` an error shows what torch printed as well, and a traceback.
    """
    debug = DEBUG in sys.argv
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
        app([text for text in sys.argv[1:] if text != DEBUG], prog_name="vfx")
    except VfxError as error:
        if debug:
            print(getattr(error, "details", ""), file=sys.stderr)
            traceback.print_exception(error)
        Console(stderr=True, soft_wrap=True).print(f"[bold red]{type(error).__name__}:[/] ", end="")
        Console(stderr=True, soft_wrap=True, markup=False).print(str(error))
        sys.exit(1)
    finally:
        warnings.showwarning = others

"""The application that every command registers with, and its entry point."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from typing import Annotated, Any

import typer

from vfx.errors import ArgumentError, VfxError, VfxNote
from vfx.progress import show

SHARED = ("merge", "repair", "prune", "prune-structured")  # commands that torchrun may start
DEBUG, QUIET = "--debug", "--quiet"  # wherever they stand

app = typer.Typer(
    help="Merge and prune trained networks without retraining. Everywhere: --quiet leaves stages and notes away, "
    "--debug shows the whole origin of an error.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from vfx import __version__

        print(f"vfx {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    """What stands before a command; its help is the application's."""


def main() -> None:
    """Entry point: vfx's own errors end with a message of one line, and its notes are a line each.

    With ``--debug`` an error shows what torch printed as well, and a traceback.
    """
    debug, quiet = DEBUG in sys.argv, QUIET in sys.argv
    show("nothing" if quiet else "bars" if sys.stderr.isatty() else "lines")
    others = warnings.showwarning

    def note(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if not issubclass(category, VfxNote):
            others(message, category, *place, **more)
        elif not quiet:
            print(f"note: {message}", file=sys.stderr)

    warnings.showwarning = note
    try:
        run([text for text in sys.argv[1:] if text not in (DEBUG, QUIET)])
    except VfxError as error:
        if debug:
            print(getattr(error, "details", ""), file=sys.stderr)
            traceback.print_exception(error)
        _say(f"{type(error).__name__}: ", str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        _stopped()
    except SystemExit as stop:  # typer's own answer to Ctrl-C says nothing
        if stop.code == 130:
            _stopped()
        raise
    finally:
        warnings.showwarning = others
        show("bars")


def run(arguments: list[str]) -> None:
    """A command with its options: in this process, or in all that ``torchrun`` started, of which the first speaks."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        app(arguments, prog_name="vfx")
        return
    from vfx.processes import across_processes, ended_by_others, first

    if not arguments or arguments[0] not in SHARED:
        raise ArgumentError(
            f"several processes share the data of vfx {', '.join(SHARED)}; start others without torchrun"
        )
    with ended_by_others(), across_processes():
        if not first():
            show("nothing")
            warnings.simplefilter("ignore")
        app(arguments, prog_name="vfx", standalone_mode=False)


def _stopped() -> None:
    _say("Stopped: ", "no file was left half written; those named as written are whole")
    sys.exit(130)


def _say(title: str, text: str) -> None:
    bold, plain = ("\033[1;31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{bold}{title}{plain}{text}", file=sys.stderr)

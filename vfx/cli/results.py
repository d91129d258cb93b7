"""What commands print and write. ``-`` is standard output, which then holds that file's text alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vfx.cli.names import names_in
from vfx.errors import ArgumentError, VfxError
from vfx.files import check_writable, write_atomic
from vfx.progress import stage

STDOUT = Path("-")


def check_outputs(out: list[Path] | None, *others: Path | None, rebuilt: str = "") -> None:
    """Raise, before any work, unless every network (``out``) and every other file can be written to a place of its own.

    ``rebuilt``: what makes the network one that no class of the user's has, and so no .safetensors file.
    """
    networks = list(out or ())
    paths = [*networks, *(path for path in others if path is not None)]
    for index, path in enumerate(paths):
        if path.resolve() in [earlier.resolve() for earlier in paths[:index]]:
            raise ArgumentError(f"{path} is named twice among the files to write")
        if path == STDOUT and index >= len(networks):
            continue
        if index < len(networks):
            check_writable(path, names_in("emit/files.py", "_WRITERS"))
            if path.suffix.lower() == ".safetensors" and rebuilt:
                from vfx.emit.files import no_class

                raise no_class(path, rebuilt)
        else:
            check_writable(path)


def tell(text: Any, *files: Path | None) -> None:
    """Print for people, unless one of ``files`` is standard output."""
    if STDOUT not in files:
        print(text)


def put(path: Path | None, text: str | bytes | Callable[[], str | bytes], *others: Path | None) -> None:
    """Write a file whole, or a text to standard output; nothing where no path is given.

    ``others``: what else is written, so that nothing is said where one of these is standard output.
    """
    if path is None:
        return
    data = text() if callable(text) else text
    if path == STDOUT:
        print(data if isinstance(data, str) else data.decode(), end="")
        return
    write_atomic(path, data)
    tell(f"wrote {path}", *others)


def picture(found: Any) -> bytes:
    """What has a ``figure()``, as a PNG."""
    from vfx.diagnosis.figures import png

    return png(found.figure())


def evaluated(given: list[Any], result: Any, examples: Any, data: Any, files: list[Path], ensemble: bool = True) -> Any:
    """What went in, its ``ensemble`` and what came out on ``data``; None where there are none."""
    if data is None:
        return None
    from vfx.diagnosis.evaluation import evaluate

    stage("evaluation")
    names = [*short_names(files), "result"]
    return evaluate(
        [*given, result], examples, data=data, names=names, ensemble=len(given) if ensemble and len(given) > 1 else 0
    )


def size_of(path: Path) -> str:
    """The size of a file on the disk, with the weights that lie beside a large .onnx."""
    beside = path.parent.glob(f"{path.name}.*.data") if path.suffix.lower() == ".onnx" else ()
    size = float(sum(file.stat().st_size for file in (path, *beside)))
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def short_names(files: list[Path]) -> list[str]:
    """The names of some files, with their folders where they are called alike."""
    names = [file.name for file in files]
    return [name if names.count(name) == 1 else str(file) for name, file in zip(names, files)]


def origin_of(files: list[Path]) -> dict[str, Any]:
    """What is written into a network about where it comes from: the command, and the digests of its checkpoints."""
    from vfx.emit.provenance import digests

    return {
        "command": " ".join(["vfx", *sys.argv[1:]]),
        "edges": digests(files),
    }


def finish(
    result: Any, out: list[Path] | None, report: Path | None, evaluation: Any = None, files: list[Path] | None = None
) -> None:
    """Print the report and write all that can be written; what cannot is said at the end.

    ``files``: the checkpoints that the result was made of, whose digests are written into it.
    """
    import json

    from vfx.emit.files import export as write
    from vfx.processes import first, wait

    wait()  # a process that is lost until here leaves no file
    if not first():
        return
    tell(result.report, report)
    if evaluation is not None:
        tell(evaluation, report)
    failures: list[VfxError] = []
    origin = origin_of(files or []) if out else {}
    for path in out or ():
        stage(f"writing {path}")
        try:
            tell(f"wrote {write(result, path, origin=origin)} ({size_of(path)})", report)
        except VfxError as error:
            failures.append(error)
    if report is not None:
        facts = result.report.to_dict() | ({} if evaluation is None else {"evaluation": evaluation.to_dict()})
        put(report, json.dumps(facts, indent=2) + "\n")
    if failures:
        raise type(failures[0])("; ".join(str(error) for error in failures))

"""Names in the catalogues, read from their source: help needs them, and importing a catalogue takes torch's seconds."""

from __future__ import annotations

import ast
from pathlib import Path

_ROOT = Path(__file__).parents[1]


def names_in(file: str, variable: str) -> tuple[str, ...]:
    """The texts that the dict (its keys) or tuple called ``variable`` holds in a file of vfx."""
    tree = ast.parse((_ROOT / file).read_text(encoding="utf-8"))
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == variable for target in targets):
            value = getattr(statement, "value", None)
            items = value.keys if isinstance(value, ast.Dict) else getattr(value, "elts", [])
            return tuple(item.value for item in items if isinstance(item, ast.Constant) and isinstance(item.value, str))
    raise LookupError(f"{file} has no {variable}")


def choices(*names: str) -> str:
    """What --help says of an option that takes one of these."""
    return f"{', '.join(names[:-1])} or {names[-1]}."

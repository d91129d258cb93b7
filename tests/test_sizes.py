"""How the code is built: short functions, few parameters, imports at the top of a file.

What does not keep to it yet is listed, and the lists only shrink: an entry that is no longer needed fails as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import vfx

ROOT = Path(vfx.__file__).parents[1]
LONGEST, LONGEST_BODY, MOST = 60, 25, 8  # lines of a function, of one whose docstring is long; parameters
INNER_IMPORTS = {
    "vfx/demo.py": 1,
    "vfx/diagnosis/barrier.py": 1,
    "vfx/diagnosis/comparison.py": 1,
    "vfx/diagnosis/diagnosis.py": 2,
    "vfx/emit/files.py": 3,
    "vfx/emit/onnx.py": 1,
}  # imports of vfx inside functions, of what reads an optional package; the command line's keep its help fast


@cache
def trees() -> dict[str, ast.Module]:
    files = [*ROOT.joinpath("vfx").rglob("*.py"), *ROOT.joinpath("passes").glob("*.py")]
    return {str(file.relative_to(ROOT)): ast.parse(file.read_text(encoding="utf-8")) for file in sorted(files)}


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Each function with the name of the class that it stands in, if any."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{one.name}", one) for one in node.body if isinstance(one, ast.FunctionDef))
    methods = {id(one) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for one in node.body}
    yield from ((n.name, n) for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and id(n) not in methods)


def is_long(function: ast.FunctionDef) -> bool:
    """Whether a function has too many lines; one with a long docstring may be longer if its body is short."""
    assert function.end_lineno is not None
    body = function.body[1:] if ast.get_docstring(function) else function.body
    lines = function.end_lineno - body[0].lineno + 1 if body else 0
    return function.end_lineno - function.lineno + 1 > LONGEST and lines > LONGEST_BODY


def parameters(function: ast.FunctionDef) -> int:
    names = [one.arg for one in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def is_public(file: str, name: str) -> bool:
    """Whether users call it: what ``vfx`` exports, its methods, and the commands."""
    return name.split(".")[0] in vfx.__all__ or (file.startswith("vfx/cli/") and not name.startswith("_"))


def inner_imports(tree: ast.Module) -> int:
    """Imports of vfx inside functions."""
    inside = (n for _, function in functions(tree) for n in ast.walk(function) if isinstance(n, ast.ImportFrom))
    return len({id(n) for n in inside if (n.module or "").split(".")[0] == "vfx"})


# the checks -----------------------------------------------------------------------------------------------------------


def test_functions_are_short() -> None:
    assert [f"{file}: {name}" for file, tree in trees().items() for name, one in functions(tree) if is_long(one)] == []


def test_only_what_users_call_takes_many_parameters() -> None:
    counts = {
        f"{file}: {name}": parameters(one)
        for file, tree in trees().items()
        for name, one in functions(tree)
        if not is_public(file, name) and parameters(one) > MOST
    }
    assert counts == {}


def test_no_private_name_is_imported() -> None:
    assert [
        f"{file}: {one.name}"
        for file, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vfx"
        for one in node.names
        if one.name.startswith("_") and not one.name.startswith("__")
    ] == []


def test_imports_stand_at_the_top() -> None:
    found = {file: inner_imports(tree) for file, tree in trees().items() if not file.startswith("vfx/cli/")}
    assert {file: count for file, count in found.items() if count} == INNER_IMPORTS


# controls -------------------------------------------------------------------------------------------------------------

LONG = "def f():\n" + "    pass\n" * 60
DOCUMENTED = 'def f():\n    """A\n' + "    line\n" * 60 + '    """\n' + "    pass\n" * 25


@pytest.mark.parametrize(
    ("text", "long"), [(LONG, True), (LONG[:-9], False), (DOCUMENTED, False), (DOCUMENTED + "    pass\n", True)]
)
def test_a_long_function_is_noticed(text: str, long: bool) -> None:
    (_, function), *_ = functions(ast.parse(text))
    assert is_long(function) == long


def test_many_parameters_and_an_inner_import_are_noticed() -> None:
    tree = ast.parse("class A:\n    def f(self, b, *, c):\n        from vfx.b import B\n        return B(b, c)\n")
    assert inner_imports(tree) == 1
    ((name, function),) = functions(tree)
    assert (name, parameters(function)) == ("A.f", 2)

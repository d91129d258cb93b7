"""How modules hang together: no circle of imports, and no private attribute read from another module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("vfx", "passes")
    for path in sorted(ROOT.glob(f"{folder}/**/*.py"))
    if "passes" not in path.relative_to(ROOT).parts[1:]  # a link to the other folder
}


def _imports(tree: ast.Module) -> Iterator[str]:
    """The modules that a file imports anywhere, for types alone and inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in FILES else node.module


def _circles(trees: dict[str, ast.Module]) -> list[set[str]]:
    graph = nx.DiGraph()
    for name, tree in trees.items():
        if name == "vfx":  # names all that is public, and imports it when it is first used
            continue
        graph.add_edges_from((name, other) for other in _imports(tree) if other in trees and other != name)
    return [found for found in nx.strongly_connected_components(graph) if len(found) > 1]


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def test_imports_form_no_circle(trees: dict[str, ast.Module]) -> None:
    assert _circles(trees) == []


def test_a_circle_is_seen(trees: dict[str, ast.Module]) -> None:
    """Control: the lowest module importing the highest one, for its types alone, is enough."""
    back = ast.parse("if TYPE_CHECKING:\n    from vfx.elements.action import act")
    assert any("vfx.analyse.places" in circle for circle in _circles(trees | {"vfx.analyse.places": back}))


def _owned(tree: ast.AST) -> set[str]:
    """Private names that a module's classes hold."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def _foreign(trees: dict[str, ast.Module]) -> list[tuple[str, str]]:
    """Private attributes of this package's classes that another module reads."""
    owned = {name: _owned(tree) for name, tree in trees.items()}
    ours = set().union(*owned.values())
    of_torch = {"_schema", "_parameters", "_buffers", "_modules", "_apply", "_replace", "_fields"}
    return [
        (name, ast.unparse(node))
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ours - owned[name] - of_torch
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        and not (isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "super")
    ]  # fmt: skip


def test_private_attributes_are_read_where_they_are_held(trees: dict[str, ast.Module]) -> None:
    assert _foreign(trees) == []


def test_a_private_attribute_read_elsewhere_is_seen(trees: dict[str, ast.Module]) -> None:
    """Control."""
    reader = ast.parse("def f(symmetry):\n    return symmetry._planes")
    assert _foreign(trees | {"vfx.analyse.shift": reader}) == [("vfx.analyse.shift", "symmetry._planes")]

"""Words: a public class has a name of its own, and the glossary says where each word's thing stands."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
GLOSSARY = ROOT / "vfx" / "GLOSSARY.md"
FILES = [path for folder in ("vfx", "passes") for path in sorted(ROOT.joinpath(folder).rglob("*.py"))]
VAGUE = {"found", "known", "one", "other", "own"}  # names that do not say what they hold


def _classes(path: Path) -> list[str]:
    return [node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]


def test_a_public_class_has_a_name_of_its_own() -> None:
    names = Counter(name for path in FILES for name in _classes(path) if not name.startswith("_"))
    assert len(names) > 200
    assert not [name for name, times in names.items() if times > 1]


def test_each_word_of_the_glossary_stands_where_it_says() -> None:
    rows = re.findall(r"^\| (.+?) \| .+ \| `(.+?)`: `(\w+)` \|$", GLOSSARY.read_text(), re.MULTILINE)
    table_lines = [line for line in GLOSSARY.read_text().splitlines() if line.startswith("| ")]
    heads = [line for line in table_lines if line.startswith("| word |") or set(line) <= set("| -")]
    assert len(rows) == len(table_lines) - len(heads) > 30
    words = Counter(word for word, _, _ in rows)
    assert not [word for word, times in words.items() if times > 1]
    for word, path, name in rows:
        assert name in _classes(ROOT / path), f"{word}: there is no class {name} in {path}"


def _bound(source: str) -> list[str]:
    """The names that a source binds: by assignment, as a loop's variable or as a parameter."""
    nodes = list(ast.walk(ast.parse(source)))
    stored = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    return stored + [node.arg for node in nodes if isinstance(node, ast.arg)]


def _vague_share(sources: list[str]) -> float:
    names = [name for source in sources for name in _bound(source)]
    return sum(name in VAGUE for name in names) / len(names)


def test_names_say_what_they_hold() -> None:
    assert _vague_share([path.read_text() for path in FILES]) <= 0.01


def test_a_vague_name_counts_wherever_it_is_bound() -> None:
    assert _vague_share(["found = 1", "for one in []: pass", "def f(own): pass", "[0 for other in []]"]) == 1.0
    assert _vague_share(["found = sizes = 1", "lambda known, node: 0"]) == 0.5
    assert _vague_share(["node.found = size = own(found)"]) == 0.0

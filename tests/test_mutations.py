"""The wrong changes of the code that ``benchmarks.mutations`` tries fit the code, and it tells which are noticed."""

from __future__ import annotations

import ast
import os
import subprocess
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import mutations
from benchmarks.forks import Forks
from benchmarks.mutations import Checkout, Row, key_of, markdown, stored, write
from benchmarks.mutations_list import CHANGES, FACTS, MUTATIONS, Mutation
from vfx.operators import Operator

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.breaks for mutation in MUTATIONS])
def test_a_change_fits_the_code(mutation: Mutation) -> None:
    text = (ROOT / mutation.file).read_text()
    assert text.count(mutation.old) == 1
    changed = ast.parse(text.replace(mutation.old, mutation.new))
    assert ast.dump(changed) != ast.dump(ast.parse(text))
    assert mutation.test_names
    for name in mutation.test_names:
        file, _, test = name.partition("::")
        assert f"def {test.partition('[')[0]}" in (ROOT / file).read_text()


def test_changes_are_drawn_over_all_folders_and_all_facts() -> None:
    folders = {path.parent for path in (ROOT / "vfx").glob("*/*.py") if path.read_text().count("\n") > 20}
    changed = {(ROOT / mutation.file).parent for mutation in CHANGES}
    assert not {folder.name for folder in folders if not any(place.is_relative_to(folder) for place in changed)}
    assert len({mutation.file for mutation in CHANGES if mutation.file.startswith("passes/")}) >= 5
    assert set(FACTS) == {fact.name for fact in fields(Operator)}
    assert len(MUTATIONS) == len(CHANGES) + len(FACTS) == len({*map(key_of, MUTATIONS)})
    assert len({mutation.breaks for mutation in MUTATIONS}) == len(MUTATIONS)


TESTED = "from vfx import double\n\ndef test_two() -> None:\n    assert double(2) == 4\n"
CHANGE = Mutation("vfx/__init__.py", "2 * x", "x + 2", "three is doubled to five", "test_two")


def _committed(folder: Path, files: dict[str, str]) -> Path:
    """A folder of files that git knows."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run(["git", "add", "."], cwd=folder, check=True)
    return folder


def test_a_change_is_noticed_by_the_tests_that_see_it(tmp_path: Path) -> None:
    files = {
        "vfx/__init__.py": "def double(x):\n    return 2 * x\n",
        "tests/test_two.py": TESTED,
        "tests/test_three.py": TESTED.replace("two", "three").replace("(2) == 4", "(3) == 6"),
    }
    source, copy = _committed(tmp_path / "source", files), tmp_path / "copy"
    (source / "tests" / "test_unknown_to_git.py").write_text("assert False")
    checkout = Checkout(copy, source, modules=("pytest",))
    assert checkout.noticed(CHANGE, whole=True)[0] == "tests/test_three.py::test_three"
    with pytest.raises(AssertionError, match="once"):
        checkout.noticed(replace(CHANGE, old="3 * x"), whole=False)
    checkout.forks.close()
    assert {name: (copy / name).read_text() for name in files} == files  # all is as it was


@pytest.mark.parametrize(
    ("status", "said", "failed"),
    [
        (0, "3 passed", []),
        (1, "FAILED tests/test_a.py::test_b[x y] - assert 1 == 2\n1 failed", ["tests/test_a.py::test_b[x y]"]),
        (2, "ERROR tests/test_a.py - ImportError: no\n1 error", ["tests/test_a.py"]),
    ],
)
def test_what_pytest_says_is_read(status: int, said: str, failed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert _saying(status, said).failing(["tests"]) == failed


def test_a_test_that_fails_anyway_notices_nothing() -> None:
    tests = {"a": "tests/test_a.py::test_b", "c": "tests/test_c.py::test_d", "e": ""}
    rows = {key: Row(key, "vfx/a.py", "", test, 1.0) for key, test in tests.items()}
    mutations._controlled(_saying(1, "FAILED tests/test_a.py::test_b - assert"), rows)
    assert rows == {"c": Row("c", "vfx/a.py", "", tests["c"], 1.0, True), "e": Row("e", "vfx/a.py", "", "", 1.0)}


def test_a_run_of_no_tests_is_no_answer() -> None:
    with pytest.raises(RuntimeError, match="ended with 4: no such file"):
        _saying(4, "no such file").failing(["tests/gone.py"])


def _saying(status: int, said: str) -> Checkout:
    """A copy in which pytest ends with a status and a text."""
    checkout = Checkout.__new__(Checkout)
    checkout.forks = SimpleNamespace(run=lambda command, limit: (status, said))  # type: ignore[assignment]
    return checkout


def test_a_run_without_end_is_ended(tmp_path: Path) -> None:
    (tmp_path / "test_long.py").write_text("import time\n\ndef test_long():\n    time.sleep(60)\n")
    forks = Forks(tmp_path, os.environ, ("pytest",))
    with pytest.raises(subprocess.TimeoutExpired):
        forks.run(["-n", "0", "test_long.py"], 1)
    assert forks.run(["-n", "0", "--co", "test_long.py"], 60)[0] == 0  # the next run is one of its own
    forks.close()


def test_another_package_than_the_copy_ends_the_run(tmp_path: Path) -> None:
    source = _committed(tmp_path / "source", {"tests/test_two.py": TESTED})
    with pytest.raises(SystemExit, match=r"nothing measured: .* is not the copy"):
        Checkout(tmp_path / "copy", source)


def test_results_go_on_where_they_were_and_are_in_todays_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(CHANGE, new="x * x", breaks="three is doubled to nine")
    monkeypatch.setattr(mutations, "MUTATIONS", (other, CHANGE))
    rows = {
        key_of(CHANGE): Row(key_of(CHANGE), CHANGE.file, "old words", "", 1.2),
        key_of(other): Row(key_of(other), other.file, other.breaks, "tests/test_two.py::test_two[a|b]", 0.6, True),
    }
    write(tmp_path, rows)
    again = stored(tmp_path / "mutations.json", (other, CHANGE))
    assert again == rows | {key_of(CHANGE): replace(rows[key_of(CHANGE)], breaks=CHANGE.breaks)}
    page = markdown(write(tmp_path, again))
    assert page.startswith("# 1 of 2 wrong changes of the code are noticed\n")
    assert "1 more of the list are not measured yet" in markdown(list(again.values())[:1])
    assert "not measured yet" not in page
    assert r"| `vfx/__init__.py` | three is doubled to nine | `test_two.py::test_two[a\|b]` | 1 |" in page
    assert page.endswith("| `vfx/__init__.py` | three is doubled to five | **none** | 1 |\n")

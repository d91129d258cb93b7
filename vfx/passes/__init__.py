"""Rewriting passes, one a file. Users reach them through ``vfx`` (``vfx.Align``, ``vfx.Interpolate``, …).

In a checkout the files lie in the folder ``passes`` at its top, in an installed package beside this one; nothing named
``passes`` is importable, so that a user's own ``passes.py`` is theirs.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
if not (_here / "align.py").is_file():
    __path__ = [str(_here.parents[1] / "passes")]

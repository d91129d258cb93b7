"""Rewriting passes, one a file. Users reach them through ``vfx`` (``vfx.Align``, ``vfx.Interpolate``, …)."""

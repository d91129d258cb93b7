"""Benchmarks: merging of the trained pairs, recovery of known permutations, and speed. Not part of the package."""

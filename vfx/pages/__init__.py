"""Pages of runs: what was done, against what, and what it costs; one file, no script, the same bytes each time."""

"""One-shot pruning: which weights, how much they matter, which of them go."""

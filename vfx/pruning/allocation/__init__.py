"""How a network's sparsity is spread over its layers."""

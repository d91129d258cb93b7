"""Which normalizations there are, and which one to take."""

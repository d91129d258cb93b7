"""Combining edges of one frame into one weight set: by changes from a common base, or layer by layer from data."""

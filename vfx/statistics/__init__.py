"""Streaming statistics of activations: one pass over the data for every tap of every edge."""

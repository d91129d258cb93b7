"""Analyses: they read a Program and never change it."""

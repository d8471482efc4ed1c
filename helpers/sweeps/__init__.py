"""Sweeps: many runs of one system, with one thing changed at a time."""

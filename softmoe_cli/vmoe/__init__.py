"""Checkpoints of the official JAX code, read without JAX."""

"""Smaller checkpoints out of one that knows several tasks."""

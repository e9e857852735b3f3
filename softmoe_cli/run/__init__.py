"""A run is a folder: its identity, rows, checkpoints and result; and what is read back from it."""

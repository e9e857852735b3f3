"""A run is a folder: its identity, rows, checkpoints and result; and how they are read back."""

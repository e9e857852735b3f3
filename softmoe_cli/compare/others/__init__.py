"""Runs that other programs made, read as their files tell them; nothing in a file is executed."""

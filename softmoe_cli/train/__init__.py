"""The loop, told once, and what it consists of."""

"""A run on one page: its curves, its costs, and its routing painted on images."""

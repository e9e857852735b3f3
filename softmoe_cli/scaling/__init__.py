"""Laws of quality against size, images and experts, fitted to finished runs, and the decisions that they imply."""

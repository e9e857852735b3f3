"""Images and labels: what lies on the disk, and what the model sees of it."""

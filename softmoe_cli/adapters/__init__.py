"""Small layers that are trained beside the sublayers of a frozen backbone."""

"""Fewer experts: which of a trained mixture's experts stay, and the smaller model that they make."""

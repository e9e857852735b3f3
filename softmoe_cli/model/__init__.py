"""A timm ViT with some of its MLPs replaced by mixtures of experts."""

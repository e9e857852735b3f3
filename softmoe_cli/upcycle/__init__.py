"""A dense ViT becomes a mixture of experts."""

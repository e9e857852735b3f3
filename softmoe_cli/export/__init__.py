"""A checkpoint as a folder for timm, torch.export, ONNX and the hub."""

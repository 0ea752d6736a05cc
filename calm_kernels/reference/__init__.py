"""Every operation in plain PyTorch: specification, fallback and test oracle."""

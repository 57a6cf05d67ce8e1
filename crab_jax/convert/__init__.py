"""Conversion between PyTorch files and checkpoints."""

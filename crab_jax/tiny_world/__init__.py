"""The tiny model on generated scenes: its pre-training from nothing, the paper's stages, and a demo."""

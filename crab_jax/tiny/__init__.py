"""The tiny world: a small model pre-trained from nothing, the paper's stages on it, and its demo."""

"""Crab and its modules, the model protocol, sizes by name, and the layout for generation."""

"""A run on disk: its folder, its data, its mesh and its parameters."""

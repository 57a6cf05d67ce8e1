"""A run on disk: its folder, its data and its parameters."""

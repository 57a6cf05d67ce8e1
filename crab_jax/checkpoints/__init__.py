"""Parameters on disk: the checkpoints of a run, packed models and imported ones."""

"""Parameters on disk: checkpoints of a run, packed models and imported models."""

"""Training: the step, the log of its metrics, and the guard against skipped steps."""

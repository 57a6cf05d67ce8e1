"""Training: the step, its metrics, and steps that are not taken."""

"""Evaluation: predictions on disk, their comparison with labels, scores with intervals, and results."""

"""Evaluation: predictions on disk, judged against labels, scored with intervals, kept as results."""

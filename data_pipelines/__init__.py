"""Data: from the files of a data root to batches."""

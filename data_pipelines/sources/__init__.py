"""Readers of the original releases of datasets, one file each, and the generated scenes."""

"""File writing, errors, locks, progress lines, value bounds and structured-file readers, for every other package."""

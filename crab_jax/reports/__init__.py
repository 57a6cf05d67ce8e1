"""HTML pages: of a run, an evaluation, an answered clip, the records of a data root, and targets to review."""

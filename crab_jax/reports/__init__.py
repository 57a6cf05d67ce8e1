"""Pages for people: a run, an evaluation, an answered clip, the records of a data root, reviewed targets."""

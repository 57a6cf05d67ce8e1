"""Programs compiled ahead of time, and what they cost: memory, collectives and arithmetic."""

"""Ahead-of-time compiled programs and their costs: memory, collectives and arithmetic."""

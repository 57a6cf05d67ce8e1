"""Users' own tables: their rows become Examples with the prompts, targets and labels of the tasks."""

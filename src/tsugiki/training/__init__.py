"""One loop that reads top to bottom, its checkpoints, and what it tells."""

"""Runtime of the trainer: errors, files, processes, progress bars and random streams."""

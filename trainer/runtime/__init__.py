"""Errors, files, processes and random streams."""

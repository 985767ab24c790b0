"""Trainer jobs as containers."""

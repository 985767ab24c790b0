"""Prompt sets and their splits."""

"""Calibration tables from a user's own images."""

"""Runtime that both programs share: process environment, console, progress, and YAML and CSV files."""

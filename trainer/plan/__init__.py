"""Cost of an iteration before anything is loaded."""

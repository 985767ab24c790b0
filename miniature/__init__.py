"""The small world: how the miniature's models are made, and the models themselves."""

"""Paired evaluation of the tuned policy against the base."""

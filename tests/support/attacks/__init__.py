"""Attacks on a running service: hostile images, bodies, prompts and connections, beside a light client."""

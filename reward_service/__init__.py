"""Reward service: scores of text-to-image results from four evaluators, by a batch `POST /score`.

Importing this package, its `client`, `protocol` or `settings` never imports torch.
"""

__version__ = "0.1.0"

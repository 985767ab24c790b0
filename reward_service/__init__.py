"""The service: four image evaluators behind one batch `POST /score`.

Importing this package, its `client`, `protocol` or `settings` never imports torch.
"""

__version__ = "0.1.0"

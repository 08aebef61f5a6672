"""A vision-language model of transformers in this process. One engine thread owns the model and serves batches.

Importing this package does not import torch, transformers or PIL. `LocalBackend.start` imports them.
"""

from backends.local.backend import LocalBackend

__all__ = ["LocalBackend"]

"""A vision-language model of transformers in this process: one engine thread that owns it, and batches.

Importing this package needs neither torch, transformers nor PIL: they are imported when `LocalBackend.start` loads.
"""

from backends.local.backend import LocalBackend

__all__ = ["LocalBackend"]

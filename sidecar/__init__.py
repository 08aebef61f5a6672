"""vlm-sidecar: learns how much a vision-model provider allows, and queues fairly for it."""

__version__ = "0.1.0"

"""vlm-sidecar: learns the limits of a vision-model provider, and queues requests fairly."""

__version__ = "0.1.0"

"""The admin listener: probes, metrics, status and the live page."""

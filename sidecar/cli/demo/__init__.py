"""`vlm-sidecar demo`: the same ten cameras with a semaphore of 1, a semaphore of 16 and a sidecar, over real HTTP."""

from sidecar.cli.demo.show import show

__all__ = ["show"]

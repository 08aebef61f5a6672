"""`vlm-sidecar demo`: the same ten cameras behind one semaphore of 1, of 16, and the sidecar, all over real HTTP."""

from sidecar.cli.demo.show import show

__all__ = ["show"]

"""How much memory the process needs: the one place that Kubernetes' limit, the documents and the tests compare with."""

from __future__ import annotations

from backends.picture_memory import MAX_PICTURE_BYTES

MIB = 1024 * 1024
#: Bytes of everything except bodies, answers and pictures: interpreter, code, connections and their buffers. An idle
#: process has 50 MiB (docs/performance.md); the rest is fragmentation. Source: `tests/chaos/test_pod_memory.py`.
BASE_BYTES = 96 * MIB


def memory_limit(queue_bytes: int) -> int:
    """Return the bytes of resident memory that a process with this `SIDECAR_QUEUE_BYTES` never exceeds.

    The setting counts twice: for the bodies that are received or wait, and for those in flight and the answers to them.
    A model in the process needs its own memory in addition.
    """
    return BASE_BYTES + 2 * queue_bytes + MAX_PICTURE_BYTES

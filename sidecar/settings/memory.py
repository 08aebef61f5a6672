"""How much memory the process needs: the one place that Kubernetes' limit, the documents and the tests compare with."""

from __future__ import annotations

from backends.picture_memory import MAX_PICTURE_BYTES

MIB = 1024 * 1024
#: Bytes of everything except bodies, answers and pictures: interpreter, code, connections and their buffers. An idle
#: process has 50 MiB (docs/performance.md); the rest is fragmentation. Source: `tests/chaos/test_pod_memory.py`.
BASE_BYTES = 96 * MIB


#: The limit of a container in proportion to the bytes that are counted. The rest is what the C library keeps of freed
#: pieces, copies that exist for a moment, and 27 kB for each connection. With every attack at once and 64 MiB, 433 MiB
#: were resident at most, of 288 MiB that may be counted. Source: `tests/chaos/test_pod_memory.py`.
UNCOUNTED_SHARE = 16 / 9


def memory_limit(queue_bytes: int) -> int:
    """Return the memory limit in bytes for a container whose process has this `SIDECAR_QUEUE_BYTES`, in whole MiB.

    The setting counts twice: for the bodies that are received or wait, and for those in flight and the answers to them.
    A model in the process needs its own memory in addition.
    """
    return int(UNCOUNTED_SHARE * (BASE_BYTES + 2 * queue_bytes + MAX_PICTURE_BYTES)) // MIB * MIB

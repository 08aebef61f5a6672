"""How much memory the process needs: the one place that Kubernetes' limit, the documents and the tests compare with."""

from __future__ import annotations

from backends.picture_memory import MAX_PICTURE_BYTES

MIB = 1024 * 1024
#: Bytes of everything except bodies, answers and pictures: interpreter, code, connections and their buffers. An idle
#: process has 50 MiB (docs/performance.md); the rest is fragmentation. Source: `tests/chaos/test_pod_memory.py`.
BASE_BYTES = 96 * MIB


#: The limit of a container in proportion to the bytes that are counted. The rest is what the C library keeps of freed
#: pieces, and 27 kB for each connection. Measured with every attack at once; see `tests/chaos/test_pod_memory.py`.
ALLOCATOR_SHARE = 4 / 3


def memory_limit(queue_bytes: int) -> int:
    """Return the memory limit in bytes for a container whose process has this `SIDECAR_QUEUE_BYTES`, in whole MiB.

    The setting counts twice: for the bodies that are received or wait, and for those in flight and the answers to them.
    A model in the process needs its own memory in addition.
    """
    return int(ALLOCATOR_SHARE * (BASE_BYTES + 2 * queue_bytes + MAX_PICTURE_BYTES)) // MIB * MIB

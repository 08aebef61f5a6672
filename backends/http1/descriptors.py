"""How the file descriptors of the process are shared, so that one use cannot take those of another one."""

from __future__ import annotations

import errno
import os
import resource

#: Maximum number of connections: of callers, and of the admin listener, which other pods can reach.
MAX_DATA_CONNECTIONS = 2048
MAX_ADMIN_CONNECTIONS = 128
#: Connections of the admin listener that even the smallest limit leaves: probes, Prometheus and a few viewers.
MIN_ADMIN_CONNECTIONS = 16
#: Descriptors for everything else that is open for a short time: files that are read again, resolving a name, and
#: connections that are closed but whose descriptors the event loop has not yet released.
SPARE = 12
#: A caller's connection can need a second one, to the upstream.
_PER_CALLER = 2
_EXHAUSTED = (errno.EMFILE, errno.ENFILE)


def limit() -> int:
    """Return how many descriptors the process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**31 if soft == resource.RLIM_INFINITY else soft


def in_use() -> int:
    """Return how many descriptors the process has."""
    return len(os.listdir("/dev/fd")) - 1  # noqa: PTH208  one is the folder's own


def admin_connections(limit: int) -> int:
    """Return the maximum number of connections of the admin listener."""
    return max(MIN_ADMIN_CONNECTIONS, min(MAX_ADMIN_CONNECTIONS, limit // 8))


def data_connections(limit: int, in_use: int) -> int:
    """Return the maximum number of callers' connections, at most `MAX_DATA_CONNECTIONS`; below 1: too few are left."""
    left = limit - in_use - admin_connections(limit) - SPARE
    return min(MAX_DATA_CONNECTIONS, left // _PER_CALLER)


def smallest_limit(in_use: int) -> int:
    """Return the smallest limit with which one caller can be served."""
    return in_use + MIN_ADMIN_CONNECTIONS + SPARE + _PER_CALLER


def is_exhausted(error: OSError) -> bool:
    """Return whether the error says that the process, or the machine, has no descriptor left."""
    return error.errno in _EXHAUSTED


def none_is_left() -> bool:
    """Return whether no descriptor is left now."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return is_exhausted(error)
    return False

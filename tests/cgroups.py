"""A cgroup that limits memory as a container's does: version 2 or 1, where this machine lets us make one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def memory_cgroup(limit: int) -> Iterator[tuple[str, ...] | None]:
    """Make a cgroup with this limit in bytes. Yields a command that runs another one in it, or None if it failed."""
    folder = None
    try:
        folder = _make(limit)
    except OSError:  # not root, or the hierarchy is read-only, as in most containers
        yield None
    else:
        yield ("sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(folder))
    finally:
        if folder is not None:
            folder.rmdir()


def _make(limit: int) -> Path:
    is_v2 = (_ROOT / "cgroup.controllers").exists()
    if is_v2:
        (_ROOT / "cgroup.subtree_control").write_text("+memory")
    folder = _ROOT / ("" if is_v2 else "memory") / f"vlm-sidecar-test-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / ("memory.max" if is_v2 else "memory.limit_in_bytes")).write_text(str(limit))
    except OSError:
        folder.rmdir()
        raise
    return folder

"""Bounds the memory of decoded pictures: one thread decodes all of them, one after the other, and says what it holds.

The caller's body is not counted here: it is counted where bodies are, also while its picture waits for its turn.
"""

from __future__ import annotations

import asyncio
import ctypes
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar
from weakref import WeakValueDictionary

_T = TypeVar("_T")

#: Bytes. Everything that one picture may take at any moment, from its decoded base64 to the composite that is drawn.
#: A 4K frame takes 32 MiB (Pillow holds 4 bytes per pixel); the rest is for its file, 10 MiB at most, and for what is
#: made of it. Source: tests/api/trio/test_picture_memory.py measures each kind of picture.
MAX_PICTURE_BYTES = 64 << 20
#: Bytes of a piece of memory that glibc does not keep after it was freed. Pictures, large bodies and large answers have
#: more; usual frames, which are freed thousands of times an hour, have less.
_LARGE_BYTES = 1 << 20
#: glibc's numbers of the two parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class PictureTooLarge(Exception):
    """The picture needs more memory than pictures may take. What would need it was not done."""


class PictureMemory:
    """Runs the jobs that decode pictures in one thread, and counts the bytes of the running one.

    The event loop stays free, and at most one picture is held at any time.
    """

    def __init__(self, max_bytes: int = MAX_PICTURE_BYTES) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        """The most that the running job may hold, in bytes; 0 if none runs."""
        self._thread = ThreadPoolExecutor(1, "pictures")
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def hold(self, count: int) -> None:
        """Say, in a job and before it takes them, how many bytes it holds from now on. Raises `PictureTooLarge`."""
        if count > self.max_bytes:
            needed, most = -(-count >> 20), self.max_bytes >> 20
            raise PictureTooLarge(f"would take {needed} MiB of memory; a picture may take {most} MiB")
        self.bytes = count

    async def run(self, key: str, job: Callable[[], _T]) -> _T:
        """Return what `job` returns in the thread. Keys take turns: each has at most one job in the thread's queue.

        After a cancellation, a job that runs is finished and one that waits is not begun.
        """
        turn = self._turns.setdefault(key, asyncio.Lock())
        async with turn:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, job)

    def _run(self, job: Callable[[], _T]) -> _T:
        give_large_pieces_back()
        try:
            return job()
        except BaseException as error:
            _forget_pictures(error)
            raise
        finally:
            self.bytes = 0


#: The pictures of this process.
PICTURES = PictureMemory()


def _forget_pictures(error: BaseException | None) -> None:
    """Clear the local variables that an error and its causes refer to: among them are the pictures."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


@cache
def give_large_pieces_back() -> None:
    """Fix the size from which glibc takes memory from the system and gives it back at once.

    Otherwise that size grows with the largest piece that was freed, up to 32 MiB, and the thread keeps a whole frame.
    Other C libraries give it back unasked.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # it is glibc
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE_BYTES)  # glibc also keeps the two in this proportion

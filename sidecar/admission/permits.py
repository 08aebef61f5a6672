"""How many attempts may be in flight."""

from __future__ import annotations


class Permits:
    """
    A counting semaphore whose size moves. It never waits: whoever finds it empty stays in the queue.

    Shrinking takes nothing back: attempts in flight finish, and none is admitted until they fit.
    """

    __slots__ = ("in_flight", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.in_flight = 0

    @property
    def free(self) -> bool:
        """One more attempt may start."""
        return self.in_flight < self.size

    def take(self) -> None:
        """Count one attempt as in flight."""
        self.in_flight += 1

    def give_back(self) -> None:
        """Count one attempt as ended."""
        assert self.in_flight > 0, "a permit was given back twice"  # noqa: S101  a defect of ours, never of a caller
        self.in_flight -= 1

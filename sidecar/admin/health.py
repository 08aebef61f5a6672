"""Started, ready, alive: three different facts about the process, each with its reason in one line."""

from __future__ import annotations

from collections.abc import Callable


class Health:
    """What the probes say. Alive needs no state: whoever answers is."""

    def __init__(self) -> None:
        self.started = False
        """The backend has started: the model is loaded, the pool is open."""
        self.draining = False
        self.backend_reason: Callable[[], str | None] = lambda: None
        """Why the backend can serve nothing at present, if so: an engine that is being restarted."""

    def unready_reason(self) -> str | None:
        """Why no new work is taken; None while it is."""
        if self.draining:
            return "draining"
        if not self.started:
            return self.backend_reason() or "starting"
        return self.backend_reason()

"""The state that the startup and readiness probes report, with the reason in one line."""

from __future__ import annotations

from collections.abc import Callable


class Health:
    """The state behind the probes. Liveness needs no state: a process that answers is alive."""

    def __init__(self) -> None:
        self.started = False
        """True when the backend has started: the model is loaded or the connection pool is open."""
        self.draining = False
        self.backend_reason: Callable[[], str | None] = lambda: None
        """Returns why the backend cannot serve at present, for example because its engine restarts; None if it can."""

    def __repr__(self) -> str:
        return f"<Health started={self.started} draining={self.draining}>"

    def unready_reason(self) -> str | None:
        """Return why the sidecar accepts no new requests; None if it accepts them."""
        if self.draining:
            return "draining"
        if not self.started:
            return self.backend_reason() or "starting"
        return self.backend_reason()

"""The states of a rate's controller."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """What the controller is doing. Also the values of the `state` label of `sidecar_limit_state`."""

    START = "start"
    """Nothing was ever refused."""
    ASSESS = "assess"
    """The limit is known roughly; the pace rises steeply to find it."""
    STEADY = "steady"
    """The limit is known well, and the pace is below it."""
    PROBE = "probe"
    """The pace is above the limit, to see whether it has risen."""
    SHARED = "shared"
    """Others use the account too: no limit of one's own can be learned, only a share be kept."""


#: By its own name: each call asks for it, and to look a member up in its enum takes as long as to call a function.
START, SHARED = State.START, State.SHARED

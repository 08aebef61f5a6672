"""The states of the learner, and the events that lead from one state to another."""

from __future__ import annotations

from enum import Enum, StrEnum, auto


class State(StrEnum):
    """The state of the learner. The values are also values of the `state` label of `sidecar_limit_state`."""

    START = "start"
    """No refusal came yet."""
    ASSESS = "assess"
    """The limit is known roughly; the pace rises steeply to find it."""
    STEADY = "steady"
    """The limit is known well, and the pace is below it."""
    PROBE = "probe"
    """The pace is above the limit, to see whether it has risen."""
    SHARED = "shared"
    """Others use the account too: no limit can be learned, so the aim is a fair share."""


class Event(Enum):
    """What changes the state of the learner."""

    FIRST_REFUSAL = auto()
    MEASURED_WELL = auto()
    """A refusal bounds the limit closely."""
    MEASURED_ROUGHLY = auto()
    BURST_FITTED = auto()
    """The latest refusals agree if the provider's bucket holds more or less than was assumed."""
    LOWER_LIMIT = auto()
    """Several refusals below the limit in a row."""
    PACE_ABOVE_LIMIT = auto()
    BLACKOUT_ENDED = auto()
    WINDOW_USED_UP = auto()
    OTHERS_CAME = auto()
    OTHERS_LEFT = auto()
    REMEMBERED = auto()
    """A limit was loaded from before a restart."""


_KNOWN = (State.ASSESS, State.STEADY, State.PROBE, State.SHARED)
#: (state, event) → state. A missing pair is impossible: `Estimate.on` raises `KeyError` for it. `UNKNOWN` (see
#: `Learner`) is no event: it initialises the learner again.
TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.START, Event.FIRST_REFUSAL): State.ASSESS,
    (State.ASSESS, Event.FIRST_REFUSAL): State.ASSESS,
    **{(state, Event.MEASURED_WELL): State.STEADY for state in _KNOWN},
    **{(state, Event.MEASURED_ROUGHLY): State.ASSESS for state in _KNOWN},
    **{(state, Event.BURST_FITTED): State.ASSESS for state in _KNOWN},
    **{(state, Event.LOWER_LIMIT): State.ASSESS for state in _KNOWN},
    (State.STEADY, Event.PACE_ABOVE_LIMIT): State.PROBE,
    **{(state, Event.BLACKOUT_ENDED): State.ASSESS for state in _KNOWN},
    **{(state, Event.WINDOW_USED_UP): State.STEADY for state in _KNOWN},
    **{(state, Event.OTHERS_CAME): State.SHARED for state in _KNOWN},
    (State.SHARED, Event.OTHERS_LEFT): State.ASSESS,
    **{(state, Event.REMEMBERED): State.ASSESS for state in State},
}
#: Names of their own, because each attempt uses them, and looking up an enum member takes as long as a function call.
START, SHARED = State.START, State.SHARED

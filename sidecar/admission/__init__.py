"""Who goes next, and when: the product's heart. Pure asyncio and arithmetic; the clock is the event loop's."""

from .admission import Admission
from .arrivals import Arrival
from .errors import (
    AccountClosed,
    DeadlineUnreachable,
    Draining,
    NotAdmitted,
    OnHold,
    QueueFull,
    Superseded,
)
from .hold import HoldKind
from .lane import Lane, Permit
from .states import State
from .ticket import CAUSES, Cause, Part, Priority, Stopwatch, Ticket

__all__ = [
    "CAUSES",
    "AccountClosed",
    "Admission",
    "Arrival",
    "Cause",
    "DeadlineUnreachable",
    "Draining",
    "HoldKind",
    "Lane",
    "NotAdmitted",
    "OnHold",
    "Part",
    "Permit",
    "Priority",
    "QueueFull",
    "State",
    "Stopwatch",
    "Superseded",
    "Ticket",
]

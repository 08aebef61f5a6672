"""Who goes next, and when: the product's heart. Pure asyncio and arithmetic; the clock is the event loop's."""

from sidecar.admission.admission import Admission
from sidecar.admission.arrivals import Arrival
from sidecar.admission.errors import (
    AccountClosed,
    DeadlineUnreachable,
    Draining,
    NotAdmitted,
    OnHold,
    QueueFull,
    Superseded,
)
from sidecar.admission.gates.circuit import HoldKind
from sidecar.admission.lane import Lane, Permit
from sidecar.admission.learning.states import State
from sidecar.admission.ticket import CAUSES, Cause, Part, Priority, Stopwatch, Ticket

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

"""Decide which request is sent next, and when: the core of the product.

Uses only asyncio and arithmetic. The event loop is the only clock.
"""

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
from sidecar.admission.hold import HoldKind
from sidecar.admission.lane import Lane, Permit
from sidecar.admission.states import State
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

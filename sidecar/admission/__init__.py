"""Decide which request is sent next, and when: the core of the product.

Uses only asyncio and arithmetic. The event loop is the only clock.
"""

from sidecar.admission.admission import NO_MODEL, Admission, PoolStatus, UpstreamSettings
from sidecar.admission.errors import (
    AccountClosed,
    DeadlineUnreachable,
    Draining,
    KeyClosed,
    NotAdmitted,
    QueueFull,
    QuotaClosed,
    StillFailing,
    Superseded,
)
from sidecar.admission.gates.base import Change, Dimension, GateStatus, Verdict
from sidecar.admission.gates.circuit import CircuitState
from sidecar.admission.learning.states import State
from sidecar.admission.ticket import CAUSES, Cause, Part, Priority, Stopwatch, Ticket
from sidecar.admission.upstream import Permit, Upstream, UpstreamStatus

__all__ = [
    "CAUSES",
    "NO_MODEL",
    "AccountClosed",
    "Admission",
    "Cause",
    "Change",
    "CircuitState",
    "DeadlineUnreachable",
    "Dimension",
    "Draining",
    "GateStatus",
    "KeyClosed",
    "NotAdmitted",
    "Part",
    "Permit",
    "PoolStatus",
    "Priority",
    "QueueFull",
    "QuotaClosed",
    "State",
    "StillFailing",
    "Stopwatch",
    "Superseded",
    "Ticket",
    "Upstream",
    "UpstreamSettings",
    "UpstreamStatus",
    "Verdict",
]

"""What the tests of the gates share: a ticket, attempts, and a circuit without an upstream."""

from sidecar.admission import Ticket, Verdict
from sidecar.admission.gates.circuit import Circuit
from sidecar.admission.gates.rise import RiseGate

TICKET = Ticket(now=0.0, deadline=60.0)


def accepted(at, **more):
    """The verdict on an attempt that the provider accepted."""
    return Verdict("accepted", at, **more)


def refused(at, named=None, retry_after=None):
    """The verdict on an attempt that a limit refused."""
    return Verdict("refused", at, named, retry_after=retry_after, reason="busy")


def make_circuit(jitter=0.0):
    """A circuit that no learner reads; `jitter` (0 to 1) takes the place of the random numbers."""
    return Circuit(
        on_close=lambda now, state, recovery: None,
        window_ends=lambda now: now,
        refusal_seconds=lambda: 0.05,
        random=lambda: jitter,
    )


def make_rise(*, cold=False, others_fail=False):
    """A gate of the slow rise that no circuit reads; it rises, or is `cold`."""
    rise = RiseGate(cold=cold, refusal_seconds=lambda: 0.5, others_fail=lambda ticket: others_fail)
    rise.answer_seconds = 0.1
    if not cold:
        rise.start(0.0)
    return rise


def probe(circuit, now, verdict, ticket=TICKET):
    """Send the half-open probe and settle it immediately."""
    circuit.settle(now, circuit.reserve(now, ticket, 0.0, held=False), verdict, blamed=None)


def attempt_beside(gate, sent_at, others, *, held=False):
    """Return the place of an attempt that starts while `others` other attempts are in flight, which then leave."""
    places = [gate.reserve(sent_at, TICKET, 0.0, held=False) for _ in range(others)]
    place = gate.reserve(sent_at, TICKET, 0.0, held=held)
    for other in places:
        gate.settle(sent_at, other, Verdict("abandoned", sent_at), blamed=None)
    return place

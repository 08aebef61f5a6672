"""A provider and a saturated queue around one gate and its learner, without admission."""

from math import inf

from sidecar.admission import Ticket, Verdict
from sidecar.admission.gates.rate import RateGate
from sidecar.admission.learning.learner import Remembered
from sidecar.admission.learning.policer_learner import PolicerLearner
from sidecar.admission.learning.tuning import ESTIMATE_RECALLED

TICKET = Ticket(now=0.0, deadline=60.0)


def make_gate(**settings):
    """A gate with today's learner, as an upstream makes it for requests."""
    return RateGate(0.0, "request_rate", PolicerLearner(0.0, **settings))


def wait(gate, now):
    """Return the seconds until one more attempt may be sent; 0 means now."""
    gate.advance(now)
    return gate.opens_at(now, 0.0) - now


def send(gate, now, *, held=False):
    return gate.reserve(now, TICKET, 0.0, held=held)


def accept(gate, now, sent):
    gate.settle(now, sent, Verdict("accepted", now), blamed=None)


def refuse(gate, now, sent):
    gate.settle(now, sent, Verdict("refused", now), blamed="request_rate")


def remember(gate, limit, burst):
    """Start with a limit from before a restart."""
    gate.resume(0.0, Remembered(limit, burst, ESTIMATE_RECALLED))


class Bucket:
    """The provider, seen from the gate: a token bucket of its own."""

    def __init__(self, rate, burst):
        self.rate, self.burst, self.level, self.at = rate, burst, burst, 0.0

    def takes(self, now):
        self.level = min(self.burst, self.level + self.rate * (now - self.at))
        self.at = now
        if self.level < 1.0 - 1e-9:
            return False
        self.level -= 1.0
        return True


class World:
    """A saturated queue in front of one gate and one bucket; a verdict comes 50 ms after its attempt was sent."""

    def __init__(self, rate=10.0, burst=10.0, gate=None, **settings):
        self.gate = gate or make_gate(**settings)
        self.control = self.gate.learner
        self.bucket = Bucket(rate, burst)
        self.now = 0.0
        self.calls = self.refused = 0
        self._answers = []

    def at_call(self, sent):
        """Called at each attempt, for checks."""

    def run(self, seconds):
        """Send whatever the gate allows, and deliver the verdicts, for so many seconds."""
        end = self.now + seconds
        while self.now < end:
            self.gate.advance(self.now)
            opens_at = self.gate.opens_at(self.now, 0.0)
            if opens_at <= self.now:
                sent = send(self.gate, self.now, held=self.calls > 0)
                self.calls += 1
                self.at_call(sent)
                self._answers.append((self.now + 0.05, sent, self.bucket.takes(self.now)))
                continue
            due = self._answers[0][0] if self._answers else inf
            self.now = min(opens_at, due)
            while self._answers and self._answers[0][0] <= self.now:
                _, sent, accepted = self._answers.pop(0)
                if accepted:
                    accept(self.gate, self.now, sent)
                else:
                    self.refused += 1
                    refuse(self.gate, self.now, sent)

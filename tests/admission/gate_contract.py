"""What every gate promises, as a random history of attempts that checks the promises after each step.

`state_of` copies the whole state of an object into plain data, so that two moments can be compared.
"""

from __future__ import annotations

from collections import Counter, deque
from enum import Enum
from math import inf, isnan
from types import FunctionType, MethodType

from hypothesis import strategies as st

from sidecar.admission import Ticket, Verdict
from sidecar.admission.gates.base import Ahead

OUTCOMES = ("accepted", "refused", "failed", "timed_out", "account", "abandoned")
NAMES = (None, "request_rate", "token_rate", "growth", "concurrency", "capacity")
USAGES = (None, (120, 30), (0, 0), (100_000, 2_000))

#: One step: seconds that pass; what happens; a number that selects among what is possible.
STEPS = st.lists(
    st.tuples(
        st.floats(0.0, 3.0) | st.just(0.0),
        st.sampled_from(("reserve", "reserve", "settle", "settle", "look")),
        st.integers(0, 10**6),
    ),
    max_size=60,
)


def state_of(value, seen=None):
    """Return everything that `value` holds, as nested tuples. Functions and tickets count by their identity."""
    seen = {} if seen is None else seen
    if value is None or isinstance(value, (bool, int, float, str, Enum)):
        return repr(value)
    if id(value) in seen:
        return ("seen", seen[id(value)])
    seen[id(value)] = len(seen)
    if isinstance(value, (FunctionType, MethodType, type, Ticket)) or type(value).__name__.startswith("builtin"):
        return ("identity", id(value))
    if isinstance(value, Counter | dict):
        return ("dict", tuple((state_of(key, seen), state_of(item, seen)) for key, item in value.items()))
    if isinstance(value, list | tuple | deque):
        return (type(value).__name__, tuple(state_of(item, seen) for item in value))
    if isinstance(value, set | frozenset):
        return ("set", tuple(sorted(map(repr, (state_of(item, {}) for item in value)))))
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    names = [*slots, *getattr(value, "__dict__", {})]
    assert names or type(value) is object, f"{type(value)} has no state that can be compared"
    return (
        type(value).__name__,
        tuple((name, state_of(getattr(value, name), seen)) for name in names if hasattr(value, name)),
    )


def check_question(gate, now, cost):
    """Ask when the gate opens, at several times and costs; check that the question changes nothing."""
    before = state_of(gate)
    answer = gate.opens_at(now, cost)
    for later in (0.0, 0.3, 1e4):
        gate.opens_at(now + later, cost)
        gate.opens_at(now + later, 1e9)
    assert gate.opens_at(now, cost) == answer
    assert state_of(gate) == before
    assert not isnan(answer)
    if gate.dormant:
        assert answer <= now
    return answer


def check_looks(gate, now, cost):
    """Predict and show; check that the gate opens when it would have opened without that."""
    gate.advance(now)
    answer = gate.opens_at(now, cost)
    for guess in (True, False):
        assert gate.seconds_for(now, Ahead(20.0, 4000.0), guess=guess) >= 0.0
        assert gate.seconds_for(now, Ahead(1.0, 1.0), guess=guess) >= 0.0
    status = gate.status(now)
    assert status.name == gate.name
    hash(status)  # frozen
    assert gate.opens_at(now, cost) == answer


def play(gate, steps):
    """Run a random history against a gate, and check what every gate promises after each step."""
    now, live = 0.0, []
    for seconds, action, number in steps:
        now += seconds
        cost = float(1 + number % 3000)
        gate.advance(now)
        opens_at = check_question(gate, now, cost)
        if action == "reserve":
            # The circuit lets one probe pass the other gates, so a gate must bear an attempt while it is closed.
            if opens_at <= now or number % 7 == 0:
                ticket = Ticket(now=now, deadline=now + 60.0, tokens=cost)
                live.append(gate.reserve(now, ticket, cost, held=number % 2 == 0))
        elif action == "settle" and live:
            settle(gate, now, live.pop(number % len(live)), number)
        else:
            check_looks(gate, now, cost)
        check_question(gate, now, cost)
    for number, reservation in enumerate(live):
        settle(gate, now, reservation, number)
    check_opens(gate, now)


def settle(gate, now, reservation, number):
    """Settle with an outcome that the number selects."""
    outcome = OUTCOMES[number % len(OUTCOMES)]
    named = NAMES[number // 7 % len(NAMES)] if outcome == "refused" else None
    blamed = None if outcome != "refused" or named == "capacity" else (named or gate.name)
    retry_after = (None, 0.5, 1e9)[number // 11 % 3]
    usage = USAGES[number // 13 % len(USAGES)] if outcome == "accepted" else None
    gate.settle(now, reservation, Verdict(outcome, now, named, usage, retry_after, "told"), blamed=blamed)


def check_opens(gate, now, cost=1.0):
    """With nothing in flight no event can come, so the gate must name a time, and be open when that has come."""
    for _ in range(100):
        gate.advance(now)
        opens_at = gate.opens_at(now, cost)
        assert opens_at < inf
        if opens_at <= now:
            return
        now = max(opens_at, now + 1e-9)
    raise AssertionError("the gate names a later time again and again")

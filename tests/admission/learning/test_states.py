"""The table of the learner's states: every entry, and nothing else."""

import pytest

from sidecar.admission.learning.estimate import Estimate
from sidecar.admission.learning.states import TRANSITIONS, Event, State


@pytest.mark.parametrize("event", Event)
@pytest.mark.parametrize("state", State)
def test_an_event_leads_to_the_state_in_the_table_or_is_impossible(state, event):
    estimate = Estimate(0.0, 1.0)
    estimate.state = state
    if (state, event) in TRANSITIONS:
        estimate.on(5.0, event, "why")
        assert (estimate.state, estimate.changed_at, estimate.changed_why) == (TRANSITIONS[state, event], 5.0, "why")
    else:
        with pytest.raises(KeyError):
            estimate.on(5.0, event, "why")
        assert estimate.state is state


def test_every_state_can_be_reached_and_left_and_nothing_returns_to_the_start():
    assert {state for state, _ in TRANSITIONS} == set(State)
    assert set(TRANSITIONS.values()) == set(State) - {State.START}

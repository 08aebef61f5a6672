"""Today's learner: which event leads from which state to which, and how well it learns a provider's limit."""

from math import inf
from random import Random

import pytest
import worlds
from worlds import Bucket, accept, make_gate, refuse, remember, send, wait

from sidecar.admission.learning.learner import UNKNOWN
from sidecar.admission.learning.policer_learner import PolicerLearner
from sidecar.admission.learning.states import State


class World(worlds.World):
    """A saturated queue in front of today's learner."""

    def until(self, state, most=300.0):
        end = self.now + most
        while self.control.state is not state and self.now < end:
            self.run(0.1)
        return self.control.state


def test_nothing_is_paced_before_the_first_refusal_but_for_what_is_unanswered():
    gate = make_gate()
    assert gate.learner.state is State.START
    for _ in range(16):
        assert wait(gate, 0.0) == 0.0
        send(gate, 0.0)
    assert wait(gate, 0.0) > 0.0
    assert wait(gate, 0.3) == 0.0


def test_the_first_refusal_leads_from_start_to_assess_and_shows_the_burst():
    world = World(rate=10.0, burst=7.0)
    world.run(0.06)
    assert world.control.state is State.ASSESS
    assert world.control.estimate.burst == pytest.approx(7.0, abs=1.0)


def test_assess_leads_to_steady_once_the_limit_is_known_well():
    world = World(rate=8.0, burst=8.0)
    assert world.until(State.STEADY) is State.STEADY
    world.run(60.0)
    assert world.control.limit == pytest.approx(8.0, rel=0.02)


def test_steady_leads_to_probe_and_a_refusal_back():
    world = World()
    world.until(State.STEADY)
    assert world.until(State.PROBE) is State.PROBE
    assert world.until(State.STEADY) is State.STEADY


def test_refused_again_and_again_leads_to_a_lower_limit_within_seconds():
    world = World()
    world.run(60.0)
    world.bucket.rate = 3.0
    world.run(10.0)
    assert world.control.limit == pytest.approx(3.0, rel=0.25)


@pytest.mark.parametrize(("rate", "burst"), [(10.0, 1.0), (10.0, 50.0), (100.0, 100.0), (1.0, 5.0)])
def test_quotas_of_every_kind_are_used_without_spending_more_than_the_budget(rate, burst):
    world = World(rate, burst)
    world.run(600.0)
    calls, refused = world.calls, world.refused
    world.run(1200.0)
    calls, refused = world.calls - calls, world.refused - refused
    assert (calls - refused) / (rate * 1200.0) > 0.97
    assert refused / calls < 0.012


def test_a_risen_limit_is_found():
    world = World()
    world.run(60.0)
    world.bucket.rate = 40.0
    world.run(60.0)
    assert world.control.limit == pytest.approx(40.0, rel=0.05)


def test_a_burst_of_refusals_counts_once_by_its_send_times():
    gate = make_gate()
    burst = [send(gate, 0.0) for _ in range(16)]
    for sent in burst[10:]:
        refuse(gate, 0.05, sent)
    assert gate.learner.estimate.burst == pytest.approx(10.0)
    limit = gate.learner.limit
    late = send(gate, 0.06)
    accept(gate, 0.5, late)
    assert gate.learner.limit == limit


def after_a_first_burst(taken):
    gate = make_gate()
    for sent in [send(gate, 0.0) for _ in range(16)][taken:]:
        refuse(gate, 0.05, sent)
    return gate


def test_after_a_small_first_burst_the_pace_rises_quickly_while_nothing_contradicts_it():
    gate, now = after_a_first_burst(taken=1), 0.05
    while now < 1.0:
        now += wait(gate, now) + 1e-6
        accept(gate, now, send(gate, now, held=True))
    assert gate.learner.pace(now) > 50.0


def test_where_nothing_was_taken_since_the_first_refusal_the_limit_is_below_one_in_that_time():
    gate = after_a_first_burst(taken=1)
    assert gate.learner.limit > 5.0
    refuse(gate, 0.25, send(gate, 0.2, held=True))
    assert gate.learner.limit == pytest.approx(5.0)
    refuse(gate, 0.65, send(gate, 0.6, held=True))
    assert gate.learner.limit == pytest.approx(1 / 0.6)


def test_the_ceiling_is_kept_and_a_lower_limit_is_learned_below_it():
    world = World(rate=5.0, burst=5.0, ceiling=8.0)
    world.run(1.0)
    assert world.control.pace(world.now) <= 8.0
    world.run(60.0)
    assert world.control.limit == pytest.approx(5.0, rel=0.05)


def test_a_limit_remembered_from_before_is_used_at_once_and_corrected():
    world = World(rate=10.0, burst=10.0)
    world.bucket.level = 0.0
    remember(world.gate, 8.0, 10.0)
    world.run(2.0)
    assert world.refused <= 1
    world.run(60.0)
    assert world.control.limit == pytest.approx(10.0, rel=0.03)


def test_a_bucket_with_credit_that_was_taken_for_one_without_is_found_out():
    """Else the pace is raised by what was saved, refused, cut and saved for again, with no end."""
    world = World(rate=1.2, burst=6.0)
    world.bucket.level = 0.0
    remember(world.gate, 1.2, 1.0)
    world.run(1800.0)
    assert world.control.estimate.burst > 1.2
    assert world.refused <= 0.01 * world.calls
    assert world.control.limit == pytest.approx(1.2, rel=0.05)


def test_a_blackout_is_told_from_a_refusal():
    gate = make_gate()
    remember(gate, 10.0, 10.0)
    now = 1.0
    for _ in range(4):
        now += 0.2
        refuse(gate, now + 0.05, send(gate, now, held=True))
        now += 0.06
    assert gate.refuses_everything


@pytest.mark.parametrize(("rate", "burst"), [(0.64, 1.28), (0.8, 3.2), (1.5, 2.5)])
def test_a_small_burst_is_found_with_the_limit(rate, burst):
    """Bounds of refusals that do not meet were computed with the wrong burst."""
    world = World(rate=rate, burst=burst)
    world.run(300.0)
    learning, calls = world.refused, world.calls
    world.run(1200.0)
    assert world.control.limit == pytest.approx(rate, rel=0.03)
    assert world.refused - learning <= 0.012 * (world.calls - calls)


class BusyBucket(Bucket):
    """Others take from it too, whenever they come: without credit that refuses a share of calls at any pace."""

    def __init__(self, rate, others, seed):
        super().__init__(rate, 1.0)
        self.random, self.others, self.next = Random(seed), others, 0.0

    def takes(self, now):
        while self.next <= now:
            self.level = min(self.burst, self.level + self.rate * (self.next - self.at)) - 1.0
            self.at = self.next
            self.next += self.random.expovariate(self.others)
        return super().takes(now)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_refusals_that_come_at_any_pace_do_not_stop_it(seed):
    """A quarter of calls meets another's. To be slower does not help, and each estimate is lower than the last."""
    world = World()
    world.bucket = BusyBucket(10.0, 2.5, seed)
    world.run(300.0)
    calls, refused = world.calls, world.refused
    world.run(300.0)
    calls, refused = world.calls - calls, world.refused - refused
    assert calls - refused >= 0.5 * 7.5 * 300.0
    assert refused <= 0.5 * calls
    assert world.control.state is State.SHARED


def test_it_learns_a_limit_again_once_the_others_have_gone():
    world = World()
    world.bucket = BusyBucket(10.0, 2.5, 1)
    world.run(300.0)
    assert world.control.state is State.SHARED
    world.bucket = Bucket(10.0, 10.0)
    world.run(200.0)
    assert world.control.state is not State.SHARED
    assert world.control.limit == pytest.approx(10.0, rel=0.05)


def test_those_who_share_an_account_get_fair_parts_of_it_and_nobody_forces_his_way():
    worlds = [World(), World(), World()]
    bucket = Bucket(15.0, 15.0)
    for world in worlds:
        world.bucket = bucket
    worlds[2].now = 60.0

    def run(until):
        now = worlds[0].now
        while now < until:
            now += 0.02
            for world in worlds:
                if world.now < now:
                    world.run(now - world.now)

    run(300.0)
    before = [(world.calls, world.refused) for world in worlds]
    run(900.0)
    calls = [world.calls - calls for world, (calls, _) in zip(worlds, before, strict=True)]
    refused = [world.refused - refused for world, (_, refused) in zip(worlds, before, strict=True)]
    assert sum(calls) - sum(refused) >= 0.95 * 15.0 * 600.0
    assert min(calls) >= 0.5 * max(calls)
    assert all(some <= 0.03 * all_ for some, all_ in zip(refused, calls, strict=True))


@pytest.mark.parametrize(("rate", "burst"), [(10.0, 10.0), (3.0, 1.0), (20.0, 40.0)])
def test_whoever_takes_others_for_there_finds_out_that_there_are_none(rate, burst):
    world = World(rate=rate, burst=burst)
    world.run(60.0)
    while not world.control._share.odd(world.now, world.control.estimate):
        pass
    assert world.control.state is State.SHARED
    world.run(600.0)
    assert world.control.state is not State.SHARED
    assert world.control.limit == pytest.approx(rate, rel=0.03)


def test_refusals_come_at_any_pace_only_if_they_go_on():
    """Who joins an account that is used up meets others who are still about to make room."""
    world = World()
    world.run(60.0)
    world.bucket = BusyBucket(10.0, 9.0, 1)
    world.run(15.0)
    assert world.control._share.climb is None
    world.run(60.0)
    assert world.control._share.climb is not None


@pytest.mark.parametrize("answers", [0, 5])
def test_a_late_refusal_after_a_new_beginning_does_not_stop_everything(answers):
    """A call from before the beginning is refused after it: the guess is an ordinary first one."""
    learner = PolicerLearner(0.0, ceiling=inf, budget=0.005, dormant=False)
    late = learner.sent(1.0, 1.0, held=False, pace=inf)
    learner.resumed(5.0, UNKNOWN)
    for number in range(answers):
        learner.accepted(5.5, learner.sent(5.1 + number / 100, 1.0, held=False, pace=inf))
    learner.refused(6.0, late)
    assert learner.pace(6.0) > 1.0

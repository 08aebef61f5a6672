"""Fast failures without words are read as refusals only if they depend on the load."""

from random import Random

import pytest

from sidecar.admission import Ticket
from sidecar.admission.learning.tuning import WORDLESS_OTHERS, WORDLESS_RECENT, WORDLESS_SLEEP_SECONDS
from sidecar.admission.learning.wordless import WordlessLimit

ANSWER_SECONDS = 0.5


class World:
    """Poisson arrivals. `fails` gets the seconds since the last accepted request and the time, and decides.

    A request that failed is sent again in place of a later one.
    """

    def __init__(self, fails, per_second, *, seconds_to_fail=0.005, seed=1):
        self.limit = WordlessLimit()
        self.fails, self.per_second, self.seconds_to_fail = fails, per_second, seconds_to_fail
        self.random = Random(seed)
        self.now = self.accepted_at = 0.0
        self.number = self.answers = 0
        self.readings = []
        self.failed = []

    def send(self, ticket=None, *, fails=None):
        """Send one request; return how its failure is read, or None if it was accepted."""
        self.number += 1
        ticket = ticket or Ticket(now=self.now, deadline=self.now + 60.0)
        load = self.limit.sent(self.now, 3) if self.limit.awake else None
        if not (self.fails(self.now - self.accepted_at, self.now) if fails is None else fails):
            self.accepted_at = self.now
            self.answers += 1
            if self.limit.awake:
                self.limit.accepted(ticket)
            return None
        self.failed.append(ticket)
        reading = self.limit.failed(
            self.now + self.seconds_to_fail,
            ticket,
            sent_at=self.now,
            number=self.number,
            load=load,
            answer_seconds=ANSWER_SECONDS,
            answers=self.answers,
        )
        self.readings.append(reading)
        return reading

    def run(self, seconds):
        end = self.now + seconds
        while self.now < end:
            self.now += self.random.expovariate(self.per_second)
            self.send(self.failed.pop(0) if len(self.failed) > 3 else None)
        return self


def limited(since, now):
    """A limit of 10/s without burst credit."""
    return since < 0.1


def test_failures_that_come_when_more_is_sent_are_refusals():
    world = World(limited, 15.0).run(10.0)
    assert world.limit.sure
    assert set(world.readings[20:]) == {"refused"}
    assert "failed" not in world.readings


def test_requests_that_always_fail_are_no_limit_whenever_they_are_sent():
    world = World(limited, 1.0)
    for _ in range(60):  # at the moment of the highest load
        for spoilt in (False, False, False, True):
            world.now += 0.2 if not spoilt else 0.001
            world.send(fails=spoilt)
        world.now += 0.001
        world.send(world.failed[-1], fails=True)
    assert not world.limit.sure
    assert "refused" not in world.readings
    assert world.readings[-2:] == ["undecided", "undecided"] or "failed" in world.readings


def test_a_few_failures_are_not_enough():
    world = World(limited, 15.0).run(0.4)
    assert 1 <= len(world.readings) <= 6
    assert not world.limit.sure


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("seed", range(5))
def test_failures_by_chance_are_no_refusals(share, seed):
    chance = Random(seed)
    world = World(lambda since, now: chance.random() < share, 10.0, seed=seed + 100).run(100.0)
    assert not world.limit.sure
    assert world.readings.count("refused") <= 10


def test_a_slow_failure_is_no_refusal():
    world = World(limited, 15.0, seconds_to_fail=0.21 * ANSWER_SECONDS).run(10.0)
    assert set(world.readings) == {"failed"}
    assert not world.limit.awake


def test_an_outage_is_no_limit_and_does_not_disprove_one():
    world = World(limited, 15.0).run(10.0)
    world.fails = lambda since, now: True
    outage = len(world.readings)
    world.run(5.0)
    assert set(world.readings[outage + 20 :]) == {"failed"}
    world.accepted_at, world.fails = world.now, limited
    assert world.run(3.0).limit.sure


def test_a_known_limit_is_given_up_when_failures_come_at_any_load():
    world = World(limited, 15.0).run(10.0)
    chance = Random(1)
    world.fails = lambda since, now: chance.random() < 0.05
    world.run(60.0)
    assert not world.limit.sure


def test_a_request_that_alone_fails_again_is_itself_the_cause():
    world = World(limited, 15.0).run(10.0)
    ticket = Ticket(now=world.now, deadline=world.now + 60.0)
    world.now += 0.12
    assert world.send(ticket, fails=True) == "refused"
    for _ in range(WORDLESS_OTHERS):
        world.now += 0.12
        assert world.send() is None
    world.now += 0.12
    assert world.send(ticket, fails=True) == "failed"
    assert world.limit.times_failed(ticket) == 2
    assert world.limit.sure


def test_a_request_that_fails_again_beside_others_is_refused():
    world = World(limited, 15.0).run(10.0)
    ticket = Ticket(now=world.now, deadline=world.now + 60.0)
    world.now += 0.01
    assert world.send(ticket, fails=True) == "refused"
    for fails in (*[False] * WORDLESS_OTHERS, True):
        world.now += 0.11 if not fails else 0.01
        world.send(fails=fails)
    world.now += 0.01
    assert world.send(ticket, fails=True) == "refused"


def test_it_remembers_a_bounded_number_and_nothing_while_nothing_fails():
    world = World(limited, 100.0).run(60.0)
    assert max(map(len, (world.limit._sent, world.limit._loads, world.limit._last_failed))) <= WORDLESS_RECENT
    world.now += WORDLESS_SLEEP_SECONDS + 1.0
    world.send()
    assert not world.limit.awake
    assert not (world.limit._sent or world.limit._loads or world.limit._last_failed)
    assert world.limit.sure


def test_after_a_quiet_time_a_sure_limit_is_doubted_if_every_attempt_fails():
    world = World(limited, 15.0).run(10.0)
    assert world.limit.sure
    world.now += 2.0 * WORDLESS_SLEEP_SECONDS
    readings = []
    for _ in range(2 * WORDLESS_OTHERS):
        world.now += 1.0
        readings.append(world.send(fails=True))
    assert readings[0] == "refused"
    assert set(readings[WORDLESS_OTHERS:]) == {"failed"}
    world.now += 1.0
    assert world.send(fails=False) is None
    world.now += 1.0
    assert world.send(fails=True) == "refused"

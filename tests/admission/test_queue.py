"""The fair queue: order within a key, shares between keys and classes, and a cost that is independent of its length."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from steps import count_lines

from sidecar.admission import Priority, Ticket
from sidecar.admission.queue import CAUGHT_UP_DIVISOR, WEIGHTS, FairQueue

KEYS = ("a", "b", "c")
keys, priorities = st.sampled_from(KEYS), st.sampled_from(Priority)


def make_ticket(key="a", deadline=60.0, tokens=1.0, **options):
    return Ticket(now=0.0, deadline=deadline, key=key, tokens=tokens, **options)


def take_next(queue):
    """Take and return the next ticket."""
    head = queue.head()
    queue.take(head)
    return head


class Model(RuleBasedStateMachine):
    """Compare the queue with a plain list of the tickets that it should contain, in order of arrival."""

    def __init__(self):
        super().__init__()
        self.queue = FairQueue()
        self.waiting = []
        self.newest_until = {}  # (class, key) -> newest first until fewer tickets than this number are left
        self.largest = 1.0

    def of(self, priority, key):
        return [ticket for ticket in self.waiting if (ticket.priority, ticket.key) == (priority, key)]

    def expected(self, priority, key):
        """Return the ticket of this key that should be next."""
        own = self.of(priority, key)
        requeued = [ticket for ticket in own if ticket.requeued]
        if requeued:
            return requeued[0]
        if self.newest_until.get((priority, key)):
            return own[-1]
        return min(own, key=lambda ticket: ticket.deadline)

    def removed(self, ticket):
        self.waiting.remove(ticket)
        left = len(self.of(ticket.priority, ticket.key))
        if left < self.newest_until.get((ticket.priority, ticket.key), 0):
            self.newest_until[ticket.priority, ticket.key] = 0
        if not any(other.priority == ticket.priority for other in self.waiting):
            for key in KEYS:
                self.newest_until[ticket.priority, key] = 0

    @rule(
        key=keys, priority=priorities, deadline=st.integers(1, 9), tokens=st.floats(0.0, 50.0), requeued=st.booleans()
    )
    def add(self, key, priority, deadline, tokens, requeued):
        ticket = make_ticket(key, float(deadline), tokens, priority=priority, size_bytes=int(tokens))
        ticket.requeued = requeued
        self.largest = max(self.largest, tokens)
        self.waiting.append(ticket)
        self.queue.add(ticket)

    @precondition(lambda self: self.waiting)
    @rule()
    def take(self):
        head = self.queue.head()
        assert head is self.queue.head()
        assert head is self.expected(head.priority, head.key)
        self.queue.take(head)
        self.removed(head)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data):
        ticket = data.draw(st.sampled_from(self.waiting))
        self.queue.remove(ticket)
        self.removed(ticket)

    @rule(priority=priorities, key=keys)
    def overload(self, priority, key):
        own = len(self.of(priority, key))
        changed = self.queue.serve_newest_first(priority, key)
        before = self.newest_until.get((priority, key), 0)
        assert changed == (own > 0 and not before)
        if own:
            self.newest_until[priority, key] = max(before, own // CAUGHT_UP_DIVISOR, 1)

    @invariant()
    def everything_is_counted(self):
        assert len(self.queue) == len(self.waiting)
        assert set(self.queue.tickets) == set(self.waiting)
        assert self.queue.cost == pytest.approx(sum(max(ticket.tokens, 1.0) for ticket in self.waiting))

    @invariant()
    def deficits_and_credits_are_bounded(self):
        for priority, group in self.queue._classes.items():
            assert -self.largest < group.credit <= WEIGHTS[priority] * self.largest + 1e-9
            for queue in group.keys.values():
                assert -self.largest < queue.deficit <= self.largest + 1e-9


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=150, stateful_step_count=60, deadline=None, derandomize=True)


def serve(queue, refill, takes):
    """Take `takes` tickets and return them. Queue a replacement, `refill(ticket)`, for each."""
    taken = []
    for _ in range(takes):
        taken.append(take_next(queue))
        queue.add(refill(taken[-1]))
    return taken


@given(costs=st.lists(st.floats(1.0, 50.0), min_size=2, max_size=6))
def test_keys_get_equal_shares_of_cost_whatever_their_tickets_cost(costs):
    queue = FairQueue()

    def like(ticket):
        return make_ticket(ticket.key, tokens=ticket.tokens)

    for key, cost in enumerate(costs):
        for _ in range(3):
            queue.add(make_ticket(str(key), tokens=cost))
    spent = Counter()
    for ticket in serve(queue, like, 400 * len(costs)):
        spent[ticket.key] += ticket.tokens
    even = spent.total() / len(costs)
    assert max(spent.values()) <= 1.1 * even + 2 * max(costs)
    assert min(spent[str(key)] for key in range(len(costs))) >= 0.9 * even - 2 * max(costs)


def test_a_camera_that_sends_much_more_gets_no_more_than_its_share():
    queue = FairQueue()
    for _ in range(500):
        queue.add(make_ticket("hog"))
    for key in "abc":
        for _ in range(5):
            queue.add(make_ticket(key))
    taken = Counter(take_next(queue).key for _ in range(20))
    assert taken == {"hog": 5, "a": 5, "b": 5, "c": 5}


@given(cost=st.floats(1.0, 2000.0), rounds=st.integers(2, 20))
def test_priorities_share_8_to_3_to_1(cost, rounds):
    queue = FairQueue()
    for priority in Priority:
        for _ in range(3):
            queue.add(make_ticket(tokens=cost, priority=priority))
    taken = Counter(
        ticket.priority
        for ticket in serve(queue, lambda ticket: make_ticket(tokens=cost, priority=ticket.priority), 240 + 12 * rounds)
    )
    for priority, weight in WEIGHTS.items():
        assert taken[priority] == pytest.approx(weight * (20 + rounds), abs=8)


def test_an_idle_class_accumulates_no_credit():
    queue = FairQueue()
    for _ in range(100):
        queue.add(make_ticket(priority=Priority.LOW))
    serve(queue, lambda ticket: make_ticket(priority=Priority.LOW), 1000)
    for _ in range(50):
        queue.add(make_ticket(priority=Priority.HIGH))
    taken = [ticket.priority for ticket in serve(queue, lambda ticket: make_ticket(priority=ticket.priority), 45)]
    assert 25 <= taken.count(Priority.HIGH) <= 44


def test_the_earliest_deadline_goes_first_while_all_can_be_served_in_time():
    queue = FairQueue()
    for deadline in (30.0, 10.0, 20.0):
        queue.add(make_ticket(deadline=deadline))
    assert [take_next(queue).deadline for _ in range(3)] == [10.0, 20.0, 30.0]


def test_the_newest_goes_first_under_overload_until_the_key_has_caught_up():
    queue = FairQueue()
    tickets = [make_ticket(deadline=float(number)) for number in range(16)]
    for ticket in tickets:
        queue.add(ticket)
    assert queue.serve_newest_first(Priority.NORMAL, "a")
    order = [int(take_next(queue).deadline) for _ in range(16)]
    assert order == [*range(15, 0, -1), 0]
    for ticket in tickets:
        queue.add(ticket)
    assert take_next(queue) is tickets[0]


def test_a_requeued_ticket_goes_before_all_others_of_its_key():
    queue = FairQueue()
    queue.add(make_ticket(deadline=1.0))
    refused = make_ticket(deadline=99.0)
    refused.requeued = True
    queue.add(refused)
    assert queue.head() is refused


@given(
    backlog=st.dictionaries(st.tuples(priorities, keys), st.integers(1, 12), min_size=1),
    priority=priorities,
    key=keys,
)
def test_the_place_of_a_new_ticket_is_predicted(backlog, priority, key):
    """If all tickets have the same cost and deadline, only present deficits and credits make the prediction inexact."""
    queue = FairQueue()
    for (other, name), length in backlog.items():
        for _ in range(length):
            queue.add(make_ticket(name, priority=other))
    newcomer = make_ticket(key, priority=priority)
    predicted, _ = queue.ahead_of(newcomer)
    queue.add(newcomer)
    ahead = 0
    while take_next(queue) is not newcomer:
        ahead += 1
    assert ahead == pytest.approx(predicted, abs=9)
    assert ahead <= sum(backlog.values())


@pytest.mark.parametrize(("keys_", "each"), [(10_000, 1), (1, 10_000), (100, 100)])
def test_taking_a_ticket_costs_the_same_whether_ten_or_ten_thousand_wait(keys_, each):
    def turn_cost(keys_, each):
        queue = FairQueue()
        for _ in range(each):
            for key in range(keys_):
                queue.add(make_ticket(str(key)))

        def turns():
            for _ in range(200):
                ticket = take_next(queue)
                queue.ahead_of(ticket)
                queue.add(make_ticket(ticket.key))

        return count_lines(turns)

    cost_of_few = turn_cost(min(keys_, 10), min(each, 10))
    assert turn_cost(keys_, each) < 1.5 * cost_of_few


@pytest.mark.parametrize("huge", [1e3, 1e6, 1e12])
def test_after_huge_tickets_the_next_turn_costs_as_many_steps_as_after_small_ones(huge):
    """The rounds that pay for a huge ticket are granted in one step, to keys and to classes."""

    def most_steps(tokens):
        queue = FairQueue()
        for priority in Priority:
            for key in range(10):
                for cost in (tokens, 1.0, 1.0):
                    queue.add(make_ticket(str(key), tokens=cost, priority=priority))
        steps = []
        while queue:
            steps.append(count_lines(lambda: take_next(queue)))
        assert len(steps) == 90
        return max(steps)

    few = most_steps(1.0)
    assert most_steps(huge) <= 4 * few

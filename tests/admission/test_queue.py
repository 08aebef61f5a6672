"""The fair queue: order within a key, shares of keys by priority, and a cost that is independent of its length."""

from collections import Counter
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from steps import count_lines

from sidecar.admission import Priority, Ticket
from sidecar.admission.queue import CAUGHT_UP_DIVISOR, EQUAL, MAX_ROUNDS, WEIGHTS, FairQueue

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
    """Compare the queue with a plain list of the tickets that it should contain, in order of arrival.

    Which key is next follows from a plain table of turns. The model computes weights by counting all waiting tickets.
    """

    def __init__(self):
        super().__init__()
        self.queue = FairQueue()
        self.waiting = []
        self.newest_until = {}  # (priority, key) -> newest first until fewer tickets than this number are left
        self.turns = {}  # (priority, key) -> its turn, and the number of the ticket with which it came
        self.now = 0.0  # the last turn that has passed
        self.number = 0

    def of(self, priority, key):
        return [ticket for ticket in self.waiting if (ticket.priority, ticket.key) == (priority, key)]

    def asked(self):
        """Return the priorities for which each waiting key asks."""
        asked = {}
        for ticket in self.waiting:
            asked.setdefault(ticket.key, set()).add(ticket.priority)
        return asked

    def weight(self, priority, key):
        asked = self.asked()
        used = [priority, *(other for other, name in self.turns if name == key and other != priority)]
        highest = max(WEIGHTS[other] for other in used)
        if 2 * sum(Priority.HIGH in of_key for of_key in asked.values()) > len(asked):
            highest = EQUAL[priority]
        return highest * WEIGHTS[priority] / sum(WEIGHTS[other] for other in used)

    def next_turn(self):
        """Return priority and key of the next turn. Turns of keys without tickets pass."""
        while True:
            place = min(self.turns, key=self.turns.get)
            if self.of(*place):
                return place
            self.now = self.turns.pop(place)[0]

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
        if not self.waiting:
            self.turns.clear()
            self.now = 0.0

    @rule(
        key=keys,
        priority=priorities,
        deadline=st.integers(1, 9),
        tokens=st.floats(0.0, 50.0),
        requeued=st.booleans(),
        has_paid=st.booleans(),
    )
    def add(self, key, priority, *, deadline, tokens, requeued, has_paid):
        ticket = make_ticket(key, float(deadline), tokens, priority=priority, size_bytes=int(tokens))
        ticket.requeued, ticket.has_paid = requeued, requeued and has_paid
        self.number += 1
        if (priority, key) not in self.turns:
            turn = self.now + self.queue._typical_cost / self.weight(priority, key)
            self.turns[priority, key] = (turn, self.number)
        self.waiting.append(ticket)
        self.queue.add(ticket)

    @precondition(lambda self: self.waiting)
    @rule()
    def take(self):
        head = self.queue.head()
        assert head is self.queue.head()
        place = self.next_turn()
        assert head is self.expected(*place)
        weight = self.weight(*place)
        self.queue.take(head)
        cost = 0.0 if head.has_paid else min(max(head.tokens, 1.0), MAX_ROUNDS * self.queue._typical_cost)
        self.now, number = self.turns[place]
        self.turns[place] = (self.now + cost / weight, number)
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

    @rule(priority=priorities, key=keys, deadline=st.integers(1, 9))
    def predict(self, priority, key, deadline):
        requests, cost = self.queue.ahead_of(make_ticket(key, float(deadline), priority=priority))
        assert 0 <= requests <= len(self.waiting) + 1e-6
        assert 0 <= cost <= self.queue.cost + 1e-6

    @invariant()
    def everything_is_counted(self):
        assert len(self.queue) == len(self.waiting)
        assert set(self.queue.tickets) == set(self.waiting)
        assert self.queue.cost == pytest.approx(sum(max(ticket.tokens, 1.0) for ticket in self.waiting))
        asked = self.asked()
        for priority, sums in self.queue._sums.items():
            of_these = {key for key in asked if min(asked[key]) == priority}
            tickets = [ticket for ticket in self.waiting if ticket.key in of_these]
            assert (sums.keys, sums.tickets) == (len(of_these), len(tickets))
            assert sums.cost == pytest.approx(sum(max(ticket.tokens, 1.0) for ticket in tickets))

    @invariant()
    def no_key_is_far_ahead_or_behind(self):
        """Each turn has not passed, and lies at most one ticket ahead at the smallest possible weight, 3 · 1/12."""
        turns = {(queue.priority, queue.key.name): turn for turn, _, queue in self.queue._turns}
        assert turns == {place: turn for place, (turn, _) in self.turns.items()}
        assert all(self.now <= turn <= self.now + 50.0 / (3 / 12) for turn in turns.values())


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


def like(ticket):
    return make_ticket(ticket.key, tokens=ticket.tokens, priority=ticket.priority)


def shares(asked, takes=3500):
    """Return the share of each key if all keys always wait. `asked`: the priorities that each key asks for."""
    queue = FairQueue()
    for key, of_key in asked.items():
        for priority in of_key:
            for _ in range(3):
                queue.add(make_ticket(key, priority=priority))
    taken = Counter(ticket.key for ticket in serve(queue, like, takes))
    return {key: taken[key] / takes for key in asked}


@given(cost=st.floats(1.0, 2000.0), rounds=st.integers(2, 20))
def test_the_priorities_of_one_key_share_8_to_3_to_1(cost, rounds):
    queue = FairQueue()
    for priority in Priority:
        for _ in range(3):
            queue.add(make_ticket(tokens=cost, priority=priority))
    taken = Counter(ticket.priority for ticket in serve(queue, like, 240 + 12 * rounds))
    for priority, weight in WEIGHTS.items():
        assert taken[priority] == pytest.approx(weight * (20 + rounds), abs=8)


def asking(high=0, normal=0, low=0):
    """Return how many keys ask for each priority, as `shares` takes it."""
    of = {Priority.HIGH: high, Priority.NORMAL: normal, Priority.LOW: low}
    return {f"{priority.name} {number}": [priority] for priority in Priority for number in range(of[priority])}


@pytest.mark.parametrize(("high", "normal", "low"), [(1, 9, 0), (5, 5, 0), (2, 1, 1), (1, 0, 1), (0, 4, 4), (3, 3, 3)])
def test_keys_share_8_to_3_to_1_while_at_most_half_of_them_ask_for_high(high, normal, low):
    """One key of ten that floods with `high` gets 8/35; the nine others get 3/35 each."""
    parts = 8 * high + 3 * normal + low
    for key, share in shares(asking(high, normal, low)).items():
        assert share == pytest.approx(WEIGHTS[Priority[key.split()[0]]] / parts, abs=0.003), key


@pytest.mark.parametrize(("high", "normal", "low"), [(6, 4, 0), (10, 0, 0), (2, 1, 0), (3, 1, 1)])
def test_if_more_than_half_of_the_keys_ask_for_high_all_shares_are_equal(high, normal, low):
    asked = asking(high, normal, low)
    for key, share in shares(asked).items():
        assert share == pytest.approx(1 / len(asked), abs=0.003), key


@pytest.mark.parametrize("used", [(0, 1, 2), (0, 1), (0, 2), (1, 2)])
def test_a_key_that_asks_for_several_priorities_gets_the_share_of_its_highest(used):
    others = asking(normal=4)
    alone = shares({"several": [Priority(min(used))]} | others)
    several = shares({"several": [Priority(number) for number in used]} | others)
    for key, share in several.items():
        assert share == pytest.approx(alone[key], abs=0.003), key


@given(chances=st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_key_gets_no_more_than_its_weight_by_changing_priorities(chances, seed):
    """The key sends at times drawn by chance, and knows when it was served. The others always wait."""
    queue, random = FairQueue(), Random(seed)
    for key in "abcd":
        for _ in range(2):
            queue.add(make_ticket(key))
    left, own, takes = Counter(), 0, 2000
    for _ in range(takes):
        for priority, chance in zip(Priority, chances, strict=True):
            if not left[priority] and random.random() < chance:
                queue.add(make_ticket("greedy", priority=priority))
                left[priority] += 1
        ticket = take_next(queue)
        if ticket.key == "greedy":
            left[ticket.priority] -= 1
            own += 1
        else:
            queue.add(like(ticket))
    assert own <= takes * 8 / (8 + 4 * 3) + 5


def test_low_is_never_starved():
    """Neither by other keys' floods of `high`, nor by the flood of its own key."""
    queue = FairQueue()
    for key in ("a", "b", "own"):
        for _ in range(1000):
            queue.add(make_ticket(key, priority=Priority.HIGH))
    for key in ("c", "d", "e"):
        queue.add(make_ticket(key, priority=Priority.NORMAL))
    queue.add(make_ticket("own", priority=Priority.LOW))
    queue.add(make_ticket("other", priority=Priority.LOW))
    taken = serve(queue, like, 400)
    waits = {key: [n for n, one in enumerate(taken) if (one.priority, one.key) == (2, key)] for key in ("own", "other")}
    for key, part in (("own", 8 / 9), ("other", 1)):
        round_ = (3 * 8 + 3 * 3 + 1) / part
        assert len(waits[key]) >= 400 // round_ - 1
        assert max(after - before for before, after in pairwise([0, *waits[key]])) <= round_ + 8


def test_a_single_request_with_high_waits_less_than_a_round():
    """A key that sends little gets an answer sooner with `high`, although it does not use its share."""

    def wait(priority):
        queue = FairQueue()
        for number in range(30):
            for _ in range(3):
                queue.add(make_ticket(str(number)))
        serve(queue, like, 300)
        newcomer = make_ticket("single", priority=priority)
        queue.add(newcomer)
        return next(n for n in range(400) if take_next(queue) is newcomer)

    assert wait(Priority.HIGH) <= 30 * 3 / 8 + 1
    assert 29 <= wait(Priority.NORMAL) <= 31
    assert wait(Priority.LOW) <= 30 * 3 + 1


@pytest.mark.parametrize(("has_paid", "order"), [(True, "baab"), (False, "baba")])
def test_a_key_pays_again_for_a_request_unless_a_limit_refused_it(has_paid, order):
    queue = FairQueue()
    for key in "ab":
        for _ in range(2):
            queue.add(make_ticket(key))
    refused = take_next(queue)
    refused.requeued, refused.has_paid = True, has_paid
    queue.add(refused)
    rest = [take_next(queue) for _ in range(4)]
    assert "".join(ticket.key for ticket in rest) == order
    assert rest[1] is refused


def test_an_idle_key_accumulates_nothing():
    queue = FairQueue()
    for _ in range(3):
        queue.add(make_ticket("busy"))
    serve(queue, like, 1000)
    for _ in range(50):
        queue.add(make_ticket("idle", priority=Priority.HIGH))
    taken = Counter(ticket.key for ticket in serve(queue, like, 44))
    assert taken["busy"] == pytest.approx(44 * 3 / 11, abs=1)


def test_a_key_does_not_escape_the_cost_of_a_large_ticket_by_waiting_with_its_next_one():
    queue = FairQueue()
    for key in "abc":
        for _ in range(3):
            queue.add(make_ticket(key))
    queue.add(make_ticket("large", tokens=20.0))
    served = serve(queue, lambda ticket: make_ticket("abc"["abcl".index(ticket.key[0]) % 3]), 8)
    assert "large" in {ticket.key for ticket in served}
    newcomer = make_ticket("large")
    queue.add(newcomer)
    assert newcomer not in serve(queue, like, 40)


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
    backlog=st.dictionaries(st.sampled_from("abcdef"), st.tuples(priorities, st.integers(1, 12)), min_size=1),
    priority=priorities,
    key=st.sampled_from("abcdef"),
)
def test_the_place_of_a_new_ticket_is_predicted(backlog, priority, key):
    """If all cost the same and nothing arrives later, the prediction errs because backlogs differ between keys."""
    queue = FairQueue()
    for name, (asked, length) in backlog.items():
        for _ in range(length):
            queue.add(make_ticket(name, priority=asked))
    newcomer = make_ticket(key, priority=backlog.get(key, (priority,))[0])
    predicted, _ = queue.ahead_of(newcomer)
    queue.add(newcomer)
    ahead = 0
    while take_next(queue) is not newcomer:
        ahead += 1
    assert ahead == pytest.approx(predicted, abs=20)
    assert ahead <= sum(length for _, length in backlog.values())


@pytest.mark.parametrize("waiting", [6, 40, 200])
@pytest.mark.parametrize("asked", [(1,), (0, 0, 0, 1), (0, 1, 2)])
def test_while_tickets_keep_coming_the_prediction_is_close_or_too_short(asked, waiting):
    """Each of 20 keys asks for one priority and replaces each of its tickets that is served.

    With equal weights the prediction is close. With others it is too short for low priorities, because it assumes that
    nothing arrives later: no request is refused because of requests that may come.
    """
    queue = FairQueue()
    ahead = {}  # the prediction, and how many were served before

    def enter(ticket, served):
        ahead[ticket] = queue.ahead_of(ticket)[0], served
        queue.add(ticket)

    for number in range(waiting):
        key = number % 20
        enter(make_ticket(str(key), priority=Priority(asked[key % len(asked)])), 0)
    errors = []
    for served in range(20 * waiting):
        ticket = take_next(queue)
        predicted, before = ahead.pop(ticket)
        if before > 5 * waiting:
            errors.append(predicted - (served - before))
        enter(like(ticket), served + 1)
    if asked == (0, 1, 2):
        assert max(errors) <= 0.2 * waiting + 1
    else:
        assert max(map(abs, errors)) <= 0.05 * waiting + 1


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
    """A key that has served a huge ticket is passed over without a step for each turn."""

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

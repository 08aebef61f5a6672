"""What headers report is a ceiling until the first refusal. What they say remains counts only after it proved right."""

from __future__ import annotations

from math import inf
from random import Random

import pytest

from backends.base import ReportedLimit
from sidecar.admission.learning.policer import Sent, Trace
from sidecar.admission.learning.reported import Reported


def limit(number=60.0, remaining=None, *, window=60.0, reset=None, refills=False, name="x-limit"):
    return ReportedLimit(name, "request_rate", number, window, remaining, reset, refills)


class Account:
    """Sends attempts one by one and reports what the headers say."""

    def __init__(self):
        self.reported = Reported(0.0)
        self.now = 0.0

    def send(self, report, *, refused=False, held=False, seconds=1.0):
        self.now += seconds
        sent = Sent(self.now, 1.0, held)
        self.reported.sent(self.now, sent, held=held, pace=self.reported.ceiling)
        risen = self.reported.report(self.now, sent, report)
        (self.reported.refused if refused else self.reported.accepted)(self.now, sent)
        return risen

    def use_up(self, *, reset=30.0):
        """Two windows, each of which ends with a refusal at which nothing remained."""
        for _ in range(2):
            self.send(limit(remaining=40.0, reset=reset), seconds=reset + 1)
            self.send(limit(remaining=0.0, reset=reset - 1))
            self.send(limit(remaining=0.0, reset=reset - 2), refused=True)


def test_the_shortest_window_up_to_an_hour_gives_the_ceiling():
    account = Account()
    account.send(limit(86400.0, window=86400.0, name="day"))
    assert account.reported.ceiling == inf
    account.send(limit(3600.0, window=3600.0, name="hour"))
    assert account.reported.ceiling == 1.0
    account.send(limit(600.0, window=60.0, name="minute"))
    assert account.reported.ceiling == 10.0


def test_the_ceiling_doubles_in_five_seconds_while_it_holds_requests_back():
    account = Account()
    account.send(limit())
    for _ in range(100):
        account.send(limit(), held=False)
    assert account.reported.ceiling == 1.0
    for _ in range(10):
        account.send(limit(), held=True, seconds=0.5)
    assert account.reported.ceiling == pytest.approx(2.0)


def test_the_first_refusal_ends_the_ceiling_for_good():
    account = Account()
    account.send(limit(), refused=True)
    account.send(limit())
    assert account.reported.ceiling == inf


def test_a_limit_is_refuted_if_far_more_is_accepted_than_it_allows():
    account = Account()
    for _ in range(150):
        account.send(limit(), seconds=0.1)
    assert account.reported.status().refuted
    honest = Account()
    for _ in range(600):
        honest.send(limit(), seconds=0.95)
    assert not honest.reported.status().refuted


def test_what_remains_is_trusted_after_two_windows_that_ended_in_a_refusal():
    account = Account()
    account.send(limit(remaining=0.0, reset=30.0), refused=True)
    account.send(limit(remaining=0.0, reset=29.0), refused=True)
    assert not account.reported.status().trusted, "two refusals in the same window are one"
    account = Account()
    account.use_up()
    assert account.reported.status().trusted
    assert account.now < account.reported.closed_until(account.now) <= account.now + 30.0


def test_a_trusted_header_waits_at_most_thirty_seconds():
    account = Account()
    account.use_up(reset=2000.0)
    assert account.reported.status().trusted
    assert account.reported.closed_until(account.now) <= account.now + 30.0


def test_two_contradictions_end_the_trust():
    account = Account()
    account.use_up()
    for _ in range(2):  # accepted, although nothing remained
        account.send(limit(remaining=0.0, reset=20.0))
    assert not account.reported.status().trusted
    assert account.reported.closed_until(account.now) == account.now


def test_refusals_while_much_remains_give_no_trust():
    account = Account()
    for _ in range(5):
        account.send(limit(remaining=50.0, reset=30.0), refused=True)
    assert not account.reported.status().trusted


def test_values_that_never_change_are_not_trusted():
    account = Account()
    for _ in range(3):
        for _ in range(40):
            account.send(limit(remaining=0.0, reset=30.0))
        account.send(limit(remaining=0.0, reset=30.0), refused=True)
    assert not account.reported.status().trusted


def test_only_a_trusted_header_reports_a_risen_limit():
    account = Account()
    account.send(limit())
    assert account.send(limit(120.0)) == 1.0
    account = Account()
    account.use_up()
    assert account.send(limit(120.0, remaining=100.0, reset=30.0), seconds=31) == 2.0


def test_a_trusted_header_shows_what_others_use():
    account = Account()
    account.use_up()
    remaining = 1000.0
    for second in range(130):
        remaining -= 3.0  # one of ours and two of others
        account.send(limit(1000.0, remaining=remaining, reset=200.0 - second))
    assert account.reported.status().others_per_second == pytest.approx(2.0, rel=0.1)


def test_answers_in_any_order_keep_the_lowest_of_a_window():
    reported = Reported(0.0)
    sent = [Sent(at, 1.0, False) for at in (1.0, 1.1, 1.2)]
    for one in sent:
        reported.sent(one.at, one, held=False, pace=inf)
    for one, remaining in ((sent[2], 7.0), (sent[0], 9.0), (sent[1], 8.0)):
        reported.report(2.0, one, limit(remaining=remaining, reset=50.0))
    assert reported.status().remaining == 7.0


def test_many_names_of_headers_take_bounded_memory():
    reported = Reported(0.0)
    for number in range(1000):
        reported.report(1.0, Sent(1.0, 1.0, False), limit(name=f"x-{number}"))
    assert len(reported._limits) <= 8


def test_the_time_at_which_the_provider_counted_makes_the_bounds_true():
    """Requests of different sizes arrive up to 1 s after they are sent. The provider allows exactly 10/s."""
    random, missed = Random(1), {"sent": 0, "counted": 0}
    for _ in range(100):
        calls = []
        for number in range(200):  # 8/s, and from 8 s on 30/s
            sent_at = 1.0 + number / 8 if number < 56 else 8.0 + (number - 56) / 30
            calls.append((sent_at + random.random(), sent_at))
        traces = {name: Trace(0.0) for name in missed}
        level = at = 0.0
        for arrived, sent_at in sorted(calls):
            level, at = min(10.0, level + 10.0 * (arrived - at)), arrived
            ones = {name: Sent(sent_at, 1.0, True) for name in missed}
            ones["counted"].counted_at = arrived
            if level < 1.0:
                break
            level -= 1.0
            for name, one in ones.items():
                traces[name].sent.append(one)
        for name, trace in traces.items():
            low, high = trace.until(ones[name]).rate(10.0)
            missed[name] += not 0.99 * low <= 10.0 <= 1.01 * high
    assert missed["counted"] == 0 < missed["sent"], missed


@pytest.mark.parametrize("amount", [1.0, 1000.0])
def test_a_ceiling_of_almost_nothing_doubles_from_the_rate_of_probes(amount):
    reported = Reported(0.0)
    now = 0.0
    reported.report(now, Sent(now, amount, True), limit(1.0, window=3600.0))
    for _ in range(60):
        sent = Sent(now, amount, True)
        reported.sent(now, sent, held=True, pace=reported.ceiling)
        reported.report(now, sent, limit(1.0, window=3600.0))
        now += min(amount / reported.ceiling, 5.0)
    assert now < 40.0
    assert reported.ceiling > 5.0 * amount

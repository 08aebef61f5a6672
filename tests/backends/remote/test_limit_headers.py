"""The limits in headers are read in every spelling, with their windows; values that cannot be limits are ignored."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.base import ReportedLimit
from backends.remote.limit_headers import LimitReader, arrived_at

#: (sender, headers, dimension, limit, window, remaining)
SPELLINGS = [
    ("OpenAI", {"x-ratelimit-limit-requests": "900", "x-ratelimit-remaining-requests": "870",
      "x-ratelimit-reset-requests": "2s"}, "request_rate", 900, 60, 870),
    ("OpenAI, a day", {"x-ratelimit-limit-requests": "240", "x-ratelimit-remaining-requests": "239",
      "x-ratelimit-reset-requests": "6m0s"}, "request_rate", 240, 86400, 239),
    ("OpenAI, tokens", {"x-ratelimit-limit-tokens": "90000", "x-ratelimit-remaining-tokens": "88500",
      "x-ratelimit-reset-tokens": "1s"}, "token_rate", 90000, 60, 88500),
    ("Groq, requests", {"X-RateLimit-Limit-Requests": "7200", "X-RateLimit-Remaining-Requests": "7190",
      "X-RateLimit-Reset-Requests": "2m0s"}, "request_rate", 7200, 86400, 7190),
    ("a second", {"x-ratelimit-limit-requests": "40", "x-ratelimit-remaining-requests": "30",
      "x-ratelimit-reset-requests": "250ms"}, "request_rate", 40, 1, 30),
    ("Azure and xAI, no reset", {"x-ratelimit-limit-tokens": "5000", "x-ratelimit-remaining-tokens": "4000"},
     "token_rate", 5000, 60, 4000),
    ("Cerebras", {"x-ratelimit-limit-requests-day": "1440", "x-ratelimit-remaining-requests-day": "1400",
      "x-ratelimit-reset-requests-day": "33011.4"}, "request_rate", 1440, 86400, 1400),
    ("Mistral", {"x-ratelimit-limit-tokens-minute": "50000", "x-ratelimit-remaining-tokens-minute": "49000",
      "x-ratelimit-tokens-query-cost": "52"}, "token_rate", 50000, 60, 49000),
    ("Mistral, requests", {"x-ratelimit-limit-req-minute": "72", "x-ratelimit-remaining-req-minute": "71"},
     "request_rate", 72, 60, 71),
    ("Mistral, older", {"ratelimitbysize-limit": "500000", "ratelimitbysize-remaining": "499000",
      "ratelimitbysize-reset": "55"}, "token_rate", 500000, 60, 499000),
    ("Anthropic", {"anthropic-ratelimit-requests-limit": "50", "anthropic-ratelimit-requests-remaining": "49",
      "anthropic-ratelimit-requests-reset": "2026-03-02T08:15:17Z"}, "request_rate", 50, 60, 49),
    ("Together", {"x-ratelimit-limit": "10", "x-ratelimit-remaining": "9", "x-ratelimit-reset": "1"},
     "request_rate", 10, 1, 9),
    ("Together, tokens", {"x-tokenlimit-limit": "3000", "x-tokenlimit-remaining": "2900"}, "token_rate", 3000, 1, 2900),
    ("Kong", {"X-RateLimit-Limit-Hour": "1000", "X-RateLimit-Remaining-Hour": "7"}, "request_rate", 1000, 3600, 7),
    ("Kong for models", {"X-AI-RateLimit-Limit-30-azure": "1000", "X-AI-RateLimit-Remaining-30-azure": "950"},
     "token_rate", 1000, 30, 950),
    ("Envoy", {"x-ratelimit-limit": '8, 8;w=1;name="a", 900;w=3600', "x-ratelimit-remaining": "5",
      "x-ratelimit-reset": "1"}, "request_rate", 8, 1, 5),
    ("LiteLLM, the provider's", {"llm_provider-x-ratelimit-limit-requests": "60"}, "request_rate", 60, 60, None),
    ("LiteLLM, its key's", {"x-ratelimit-api_key-limit-tokens": "6000", "x-ratelimit-api_key-remaining-tokens": "5000"},
     "token_rate", 6000, 60, 5000),
    ("IETF 03", {"RateLimit-Limit": "100, 100;w=20", "RateLimit-Remaining": "50", "RateLimit-Reset": "5"},
     "request_rate", 100, 20, 50),
    ("IETF 07", {"RateLimit": "limit=70, remaining=50, reset=30", "RateLimit-Policy": "70;w=60"},
     "request_rate", 70, 60, 50),
    ("IETF 10", {"RateLimit": '"burst";r=50;t=30', "RateLimit-Policy": '"burst";q=70;w=10'},
     "request_rate", 70, 10, 50),
    ("OpenRouter", {"X-RateLimit-Limit": "20", "X-RateLimit-Remaining": "19", "X-RateLimit-Reset": "1772439360000",
      "Date": "Mon, 02 Mar 2026 08:15:04 GMT"}, "request_rate", 20, 60, 19),
]  # fmt: skip


@pytest.mark.parametrize(("headers", "dimension", "limit", "window", "remaining"), [row[1:] for row in SPELLINGS],
                         ids=[row[0] for row in SPELLINGS])  # fmt: skip
def test_every_spelling_is_read(headers, dimension, limit, window, remaining):
    [one] = LimitReader().read(headers)
    assert (one.dimension, one.limit, one.remaining) == (dimension, limit, remaining)
    assert one.window == pytest.approx(window, rel=0.01)


@pytest.mark.parametrize("value", ["-1", "0", "1e-320", "2e9", "nan", "inf", "", "many"])
def test_a_value_that_is_no_limit_is_ignored(value):
    assert LimitReader().read({"x-ratelimit-limit-requests": value, "x-ratelimit-remaining-requests": "0"}) == ()


@pytest.mark.parametrize("value", ["-1", "61", "nan", "some"])
def test_a_limit_is_ignored_if_what_remains_of_it_is_impossible(value):
    assert LimitReader().read({"x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": value}) == ()


@pytest.mark.parametrize("value", ["-5s", "infs", "nans", "infms", "-1ms", "1e999s"])
@pytest.mark.parametrize("suffix", ["", "-requests", "-minute"])
def test_a_reset_that_is_no_time_is_ignored(suffix, value):
    headers = {
        f"x-ratelimit-{role}{suffix}": text for role, text in (("limit", "9"), ("remaining", "0"), ("reset", value))
    }
    [one] = LimitReader().read(headers)
    assert one.reset is None
    assert one.window in (None, 60)


def test_other_headers_report_no_limit():
    headers = {"x-limit": "3", "content-length": "3", "x-ratelimit-limit-input-tokens": "9", "x-concurrency-limit": "4"}
    assert LimitReader().read(headers) == ()


def test_the_window_is_the_longest_reset_if_nothing_else_shows_it():
    reader = LimitReader()
    windows = [reader.read({"ratelimit-limit": "9", "ratelimit-reset": text})[0].window for text in ("7", "20", "4")]
    assert windows == [7, 20, 20]


def test_a_reader_remembers_a_bounded_number_of_limits():
    reader = LimitReader()
    for number in range(1000):
        reader.read({"x-ratelimit-limit-requests": str(number + 1)})
    assert len(reader._known) <= 64


@given(st.dictionaries(st.sampled_from([name for row in SPELLINGS for name in row[1]]), st.text(max_size=40)))
def test_no_value_raises_or_gives_an_impossible_limit(headers):
    for one in LimitReader().read(headers):
        assert isinstance(one, ReportedLimit)
        assert 1 <= one.limit <= 1e9
        assert one.remaining is None or 0 <= one.remaining <= one.limit
        assert one.window is None or one.window > 0
        assert one.reset is None or 0 <= one.reset < inf


@pytest.mark.parametrize("reset", ["-5s", "-1ms", "-1", "1e999s", "infs", "nans", "nanms", "1e12s", "9" * 300])
@pytest.mark.parametrize("names", [SPELLINGS[0][1], SPELLINGS[11][1], SPELLINGS[15][1], SPELLINGS[18][1]])
def test_in_no_spelling_a_reset_is_read_that_is_no_time(names, reset):
    headers = {name: reset if "reset" in name.lower() else "0" if "remaining" in name.lower() else value
               for name, value in names.items()}  # fmt: skip
    for one in LimitReader().read(headers):
        assert one.window is None or 0 < one.window <= 366 * 86400
        assert one.reset is None or 0 <= one.reset <= 366 * 86400


def test_the_time_of_counting_is_read_in_unix_milliseconds():
    assert arrived_at({"req-arrive-time": "1772439304250"}) == 1772439304.25
    for text in ("", "soon", "1772439304", "-1", "1" * 40):
        assert arrived_at({"req-arrive-time": text}) is None

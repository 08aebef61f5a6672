"""The wait that a provider asks for, in every header that can contain it."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.remote.waits import retry_after

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)


def http_date(seconds_from_now: float) -> str:
    return format_datetime(datetime.fromtimestamp(NOW.timestamp() + seconds_from_now, UTC), usegmt=True)


WAITS = [
    ({}, None),
    ({"Retry-After": "7"}, 7.0),
    ({"retry-after": " 7 "}, 7.0),
    ({"RETRY-AFTER": "1.5"}, 1.5),
    ({"Retry-After": "0"}, 0.0),
    ({"Retry-After": "1e9"}, 1e9),
    ({"Retry-After": "30s"}, 30.0),
    ({"Retry-After": "6m0s"}, 360.0),
    ({"Retry-After": http_date(90)}, 90.0),
    ({"Retry-After": http_date(-90)}, 0.0),
    ({"Retry-After": http_date(-3510), "Date": http_date(-3600)}, 90.0),  # our clock is an hour ahead of the provider's
    ({"Retry-After": http_date(90), "Date": "yesterday"}, 90.0),
    ({"Retry-After": "-1"}, None),
    ({"Retry-After": "NaN"}, None),
    ({"Retry-After": "inf"}, None),
    ({"retry-after-ms": "1e300"}, None),
    ({"RateLimit": "r=0, t=" + "9" * 400}, None),
    ({"Retry-After": "999999999999d"}, None),
    ({"Retry-After": "9" * 400}, None),
    ({"Retry-After": ""}, None),
    ({"Retry-After": "soon"}, None),
    ({"Retry-After": "Fri, 99 Zzz 2026 99:99:99 GMT"}, None),
    ({"retry-after-ms": "250"}, 0.25),
    ({"retry-after-ms": "250", "Retry-After": "1"}, 0.25),
    ({"retry-after-ms": "nan", "Retry-After": "1"}, 1.0),
    ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1s"}, 1.0),
    ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6m0s"}, 360.0),
    ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "20ms"}, 0.02),
    ({"x-ratelimit-remaining-requests": "12", "x-ratelimit-reset-requests": "1s"}, None),
    ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1732449600"}, None),
    ({"x-ratelimit-reset": "1732449600"}, None),
    ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1s", "Retry-After": "9"}, 9.0),
    ({"llm_provider-retry-after": "17"}, 17.0),
    ({"x-retry-in": "2.5s"}, 2.5),
    ({"RateLimit": '"a";r=0;t=30'}, 30.0),
    ({"RateLimit-Reset": "42"}, 42.0),
    ({"RateLimit-Reset": "42", "RateLimit-Remaining": "3"}, None),
    ({"x-rate-limit-reset-tokens": "55"}, 55.0),
    ({"x-ratelimit-reset": str(int(NOW.timestamp()) + 20)}, 20.0),
    ({"x-ratelimit-reset": str(1000 * int(NOW.timestamp()) + 20_000)}, 20.0),
    ({"x-ratelimit-reset-requests-day": "2026-11-24T13:00:00Z"}, 3600.0),
    ({"anthropic-ratelimit-requests-reset": "2026-11-24T12:00:41Z", "Date": http_date(0)}, 41.0),
    ({"anthropic-ratelimit-tokens-reset": "2026-11-24T12:00:41+00:00",
      "anthropic-ratelimit-tokens-remaining": "9"}, None),
    # OpenAI and Groq: the time until the quota is full, so one request is possible after reset / limit
    ({"x-ratelimit-limit-requests": "500", "x-ratelimit-remaining-requests": "0",
      "x-ratelimit-reset-requests": "1m0s"}, 0.12),
    ({"x-ratelimit-limit-tokens": "-1", "x-ratelimit-remaining-tokens": "-1", "x-ratelimit-reset-tokens": "0"}, None),
]  # fmt: skip
TEXTS = [
    ("please try again in 174ms. visit", 0.174),
    ("try again in 1h2m3.4s", 3723.4),
    ("retry after 86400 seconds", 86400.0),
    ("expected available in 3 seconds.", 3.0),
    ("quota will be replenished in 2.03:12:41.", 184361.0),
    ("请在 12 秒后重试", 12.0),
    ("you will regain access on 2026-11-24 at 13:00 utc", 3600.0),
    ("10 requests per 60s are allowed", None),
    ("please try again later", None),
]


@pytest.mark.parametrize(("headers", "seconds"), WAITS)
def test_the_wait_that_a_provider_asks_for_is_read_in_every_valid_spelling(headers, seconds):
    assert retry_after(headers, NOW.timestamp()) == pytest.approx(seconds)


@pytest.mark.parametrize(("text", "seconds"), TEXTS)
def test_the_wait_in_a_message_is_read(text, seconds):
    assert retry_after({}, NOW.timestamp(), text) == pytest.approx(seconds)
    assert retry_after({"Retry-After": "1"}, NOW.timestamp(), text) == 1.0


def test_googles_delay_is_read_before_the_text():
    assert retry_after({}, NOW.timestamp(), "retry in 3s", "17.5s") == 17.5


@given(
    name=st.sampled_from(["Retry-After", "retry-after-ms", "x-ratelimit-reset-requests"]),
    value=st.text() | st.floats().map(str) | st.integers().map(str) | st.datetimes().map(format_datetime),
    date=st.text() | st.datetimes().map(format_datetime),
    now=st.floats(0, 4e9),
)
def test_the_wait_is_finite_and_not_negative_for_all_headers(name, value, date, now):
    seconds = retry_after({name: value, "Date": date, "x-ratelimit-remaining-requests": "0"}, now)
    assert seconds is None or (math.isfinite(seconds) and seconds >= 0)

"""Words of the caller that a provider quotes, and hints of the provider that name another limit than the one it hit."""

from __future__ import annotations

import json

import pytest
from answer_readings import meaning_of

from backends.remote import refusal_rules
from backends.remote.refusals import classify


def said(text: str, code: object = None, **more: object) -> bytes:
    return json.dumps({"error": {"message": text, "code": code, **more}}).encode()


def meaning(status: int, body: bytes, request: object = None, **headers: str) -> str:
    sent = b"" if request is None else json.dumps(request).encode()
    return meaning_of(classify(status, headers, body, request_body=sent))


FACTS = [
    "(2056)",
    "(1008)",
    "requests per day (actual/limit): 7/3",
    "tokens per minute (actual/limit): 7/3",
    "current rpm: 8, rpm limit: 2",
]


@pytest.mark.parametrize("status", [400, 404, 405, 409, 413, 415, 422])
@pytest.mark.parametrize("fact", FACTS)
def test_facts_inside_an_ordinary_rejection_are_no_facts(status, fact):
    for text in (fact, f"the role '{fact}' is unknown", f"no model {fact}"):
        assert meaning(status, said(text)) == "rejected"
        assert meaning(status, said(text, "invalid_value", param="role")) == "rejected"


@pytest.mark.parametrize("status", [403, 429, 500, 503])
@pytest.mark.parametrize("fact", FACTS)
def test_facts_that_are_quoted_or_in_the_request_or_about_a_field_prove_nothing(status, fact):
    without = meaning(status, said("no"))
    assert meaning(status, said(fact)) != without
    assert meaning(status, said(f"no: '{fact}'")) not in ("billing", "quota_period")
    assert meaning(status, said("no (1008)", param="role")) == without
    assert meaning(status, said("no (1008)"), {"role": "x (1008)"}) == without


@pytest.mark.parametrize("number", [1008, 1039, 11202])
def test_a_size_in_parentheses_is_no_code(number):
    assert meaning(400, said(f"The picture's width ({number}) is no multiple of 32")) == "rejected"


def test_a_number_that_decides_is_shown_as_the_code():
    assert classify(429, {}, said("used up (2056)")).code == "2056"
    assert classify(400, {}, said("too wide (2056)")).code == ""


ADVICE = [
    "Above the rate limit of 9,000 input tokens per minute. Please reduce the prompt length, or try again later.",
    "More than the limit of input tokens per minute. Reduce the length of the prompt and try again.",
    "Over the limit of input tokens per minute: your input must be reduced, or wait.",
]


@pytest.mark.parametrize("text", ADVICE)
def test_advice_to_send_less_does_not_make_a_passing_limit_a_fault_of_the_request(text):
    assert meaning(429, said(text, "rate_limit_error")) == "token_rate"
    assert meaning(200, said(text, "rate_limit_error")) == "token_rate"


def test_a_wait_beside_advice_to_send_less_means_a_limit_that_passes():
    text = "Over the tokens per minute; the input must be reduced"
    assert meaning(429, said(text)) == "rejected"
    assert meaning(429, said(text), **{"Retry-After": "8"}) == "token_rate"
    assert meaning(429, said("Too many concurrent requests. Reduce the number of input requests")) == "concurrency"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("The request is too large for the tokens per minute", None),
        ("Rate limit on tokens: Limit 500, Requested 800. Please try again later", "rate_limit_exceeded"),
        ("no", "request_too_large"),
    ],
)
def test_a_request_above_the_limit_is_at_fault_itself_also_as_429(text, code):
    error = classify(429, {}, said(text, code))
    assert (meaning_of(error), error.status) == ("rejected", 413)


def test_a_quoted_message_of_the_request_is_not_unwrapped():
    text = "[{'loc': ('body', 'messages'), 'input': {'message': 'this bill_is_overdue'}}]"
    assert meaning(400, said(text)) == "rejected"
    assert meaning(200, said(text, 400)) == "rejected"
    request = {"messages": [{"message": "this bill_is_overdue"}]}
    assert meaning(403, said(text), request) == "rejected"
    assert meaning(403, said(text)) == "billing"  # a gateway that wraps the provider's error


SPELLINGS = [
    "bill_is_overdue",
    "billIsOverdue",
    "bill  is\n\toverdue",
    "bill\u2003is\u3000overdue",
    "BILL IS OVERDUE",
    "bill\u00a0is overdue",
]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("status", [400, 403])
def test_words_of_the_request_are_found_in_it_however_they_are_spelled(spelling, status):
    body = said(f"no such model={spelling} for you")
    assert meaning(status, body) == "billing"
    for ascii_only in (False, True):
        request = json.dumps({"model": spelling}, ensure_ascii=ascii_only).encode()
        assert meaning_of(classify(status, {}, body, request_body=request)) == "rejected"
    escaped = b'{"model": "' + b"".join(b"\\u%04X" % ord(letter) for letter in spelling) + b'"}'
    assert meaning_of(classify(status, {}, body, request_body=escaped)) == "rejected"


def test_words_with_other_characters_are_found_in_the_request():
    for said_by_caller in (
        'account "a/b\\c" is suspended',
        "account é is suspended",
        "bill is 'x' overdue, in arrears",
    ):
        assert meaning(400, said(said_by_caller), {"text": said_by_caller}) == "rejected"
    assert meaning(400, said("please topup"), {"text": "Please Topup"}) == "rejected"
    assert meaning(400, said("no \u212aey, in arrears; to\u212aen quota is not enough"), {"text": "x"}) == "billing"
    assert (
        meaning(400, said("to\u212aen quota is not enough"), {"text": "to\u212aen quota is not enough"}) == "rejected"
    )


def test_a_request_with_very_many_escapes_counts_as_containing_every_word():
    body = said("the bill is overdue")
    assert meaning(400, body, {"text": "é" * 10_000}) == "billing"
    assert meaning(400, body, {"text": "é" * 30_000}) == "rejected"


def test_a_refusal_beside_an_ordinary_request_with_escapes_is_believed():
    assert meaning(403, said("账户余额不足"), {"text": "描述这张图片"}) == "billing"


HINTS = [
    ("At most 12 per minute. (The plan also has 500 requests per day.)", "request_rate"),
    ("30 requests per minute reached. Raise your monthly usage limit for more.", "request_rate"),
    ("RPM: 3 is reached. A higher tier has a monthly quota of requests.", "request_rate"),
    ("9000 tokens per minute are used up; 500 requests per day are left", "token_rate"),
    ("5 per 10s. See your billing details", "unknown"),
    ("每分钟请求数超限,每日额度充足", "request_rate"),
    # the long window first, or alone
    ("500 requests per day are used up (12 per minute are allowed)", "quota_period"),
    ("Raise your monthly usage limit. It allows 30 requests per minute", "billing"),
    ("Wait 20 seconds or a minute; the daily limit is reached", "quota_period"),
]


@pytest.mark.parametrize(("text", "expected"), HINTS)
def test_a_short_window_that_is_named_first_is_the_limit_that_was_hit(text, expected):
    assert meaning(429, said(text)) == expected
    assert meaning(429, said(text, "rate_limit_error")) == expected


def test_without_a_hint_the_words_behind_a_short_window_count():
    assert meaning(429, said("12 requests per minute: too many concurrent requests")) == "concurrency"


FIELDS = ["auto_balance_range", "invalid_token_position", "payment_field_missing", "billing_address",
          "case_sensitive_key", "overdue_flag_unknown", "bad_token_ids", "suspended_sequences"]  # fmt: skip


@pytest.mark.parametrize("code", FIELDS)
def test_a_single_word_in_the_code_of_a_rejection_is_the_name_of_a_field(code):
    assert meaning(400, said("not supported", code)) == "rejected"
    assert meaning(422, said("not supported", code)) == "rejected"


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "balance_problem", "billing"),
        (429, "payment_late", "billing"),
        (403, "invalid_token", "unauthorized"),
        (400, "insufficient_balance", "billing"),
        (400, "UserBalanceNotEnough", "billing"),
        (400, "invalid_access_token", "unauthorized"),
        (400, "CustomerBillOverdue", "billing"),
    ],
)
def test_a_code_about_the_account_still_counts(status, code, expected):
    assert meaning(status, said("no", code)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "failed on prompt: is that road busy",
        "failed to load 3 images per prompt",
        "the limit of tokens per image failed",
    ],
)
def test_a_failure_that_quotes_the_request_is_a_failure(text):
    assert meaning(500, said(text, type="InternalServerError")) == "server"


def test_words_about_load_in_a_failure_count_unless_the_request_has_them():
    for text, kind in (("that lane is busy", "capacity"), ("12 calls per minute", "request_rate")):
        assert meaning(500, said(text), {"content": "A dog"}) == kind
        assert meaning(500, said(text), {"content": text}) == "server"
        assert meaning(503, said(text), {"content": text}) == kind
        assert meaning(500, said(text, param="messages")) == "server"


def test_a_message_that_agrees_with_the_request_in_many_places_is_searched_for_a_few_times(
    monkeypatch,
):
    searched = []
    spelling = refusal_rules._spelling
    monkeypatch.setattr(refusal_rules, "_spelling", lambda words: searched.append(words) or spelling(words))
    lines = [
        "insufficient balance, balance too low, out of credits, add credits, spending limit reached",
        "over budget, the account is suspended, bill is overdue, payment required, plan expired, please recharge",
        "invalid api key, api key expired, inappropriate content, requests per day, daily limit, try tomorrow",
        "quota exceeded, free trial expired, this month, 24 hour limit, billing details, monthly usage limit, 余额不足",
    ]
    text = " ".join(lines)
    assert meaning(403, said(text), {"content": text}) == "rejected"
    assert 1 < len(searched) <= 16

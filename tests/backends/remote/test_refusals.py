"""The classification of provider errors, in all their formats."""

from __future__ import annotations

import json
import math

import pytest
from answer_readings import meaning_of
from hypothesis import given
from hypothesis import strategies as st

from backends.base import Throttled
from backends.remote.refusals import classify


def openai_shape(code: str | None, message: str, type_: str | None = None) -> bytes:
    return json.dumps(
        {"error": {"message": message, "type": type_ or code, "param": None, "code": code}, "request_id": "r-1"}
    ).encode()


def native_shape(code: str | None, message: str, type_: str | None = None) -> bytes:
    return json.dumps({"code": code, "message": message, "request_id": "r-1"}).encode()


CONSOLE = "For details, see: https://help.aliyun.com/zh/model-studio/error-code#token-limit"
QUOTA = "You exceeded your current quota, please check your plan and billing details."

# Codes and texts from Model Studio's page "Error messages".
DASHSCOPE = [
    (429, "Throttling.RateQuota", "Requests rate limit exceeded, please try again later.", "request_rate"),
    (429, "LimitRequests", "You have exceeded your request limit.", "request_rate"),
    (429, "limit_requests", "You exceeded your current requests list.", "request_rate"),
    (429, "Throttling.AllocationQuota", "Allocated quota exceeded, please increase your quota limit.", "token_rate"),
    (429, "insufficient_quota", f"Allocated quota exceeded, please increase your quota limit. {CONSOLE}", "token_rate"),
    (429, "insufficient_quota", f"{QUOTA} {CONSOLE}", "token_rate"),
    (429, "insufficient_quota", "", "token_rate"),
    (429, "Throttling.AllocationQuota", "Free allocated quota exceeded.", "billing"),
    (429, "insufficient_quota", "Free allocated quota exceeded.", "billing"),
    (429, "Throttling.BurstRate", "Request rate increased too quickly.", "growth"),
    (429, "limit_burst_rate", "Request rate increased too quickly. To ensure system stability, …", "growth"),
    (429, "Throttling.Concurrency", "", "concurrency"),
    (429, "Throttling", "Requests throttling triggered.", "unknown"),
    (429, "Throttling", "Too many requests in route. Please try again later.", "unknown"),
    (429, "Throttling", "Request rate increased too quickly.", "growth"),
    (429, "Throttling", "Too many concurrent requests.", "concurrency"),
    (400, "Throttling.Something.New", "Slow down.", "unknown"),
    (429, "SomethingNew", "No.", "unknown"),
    (400, "Arrearage", "Access denied, please make sure your account is in good standing.", "billing"),
    (400, "AccessDenied", "Access denied, please make sure your account is in good standing.", "billing"),
    (429, "CommodityNotPurchased", "Commodity has not purchased yet.", "billing"),
    (429, "PrepaidBillOverdue", "The prepaid bill is overdue.", "billing"),
    (429, "PostpaidBillOverdue", "The postpaid bill is overdue.", "billing"),
    (403, "AllocationQuota.FreeTierOnly", "The free tier of the model has been exhausted.", "billing"),
    (
        503,
        "ModelServingError",
        "Too many requests. Your requests are being throttled due to system capacity",
        "capacity",
    ),
    (500, "ModelServingError", "Too many requests.", "capacity"),
    (503, "ModelUnavailable", "Model is unavailable, please try again later.", "capacity"),
    (500, "InternalError.Algo.ModelServingError.ModelServingUnknownError", "system capacity limits", "capacity"),
    (500, "InternalError", "An internal error has occured.", "server"),
    (500, "internal_error", "java.util.concurrent.TimeoutException", "server"),
    (500, "InternalError.Timeout", "", "server"),
    (500, "InternalError.Algo", "inference internal error.", "server"),
    (500, "RequestTimeOut", "Request timed out, please try again later.", "server"),
    (400, "RequestTimeOut", "Request timed out, please try again later.", "server"),
    (400, "DataInspectionFailed", "Input data may contain inappropriate content.", "moderated"),
    (400, "data_inspection_failed", "Output data may contain inappropriate content.", "moderated"),
    (400, "InternalError.Algo.DataInspectionFailed", "Output data may contain…", "moderated"),
    (400, "SomethingNew", "Input text data may contain inappropriate content.", "moderated"),
    (400, "InvalidParameter", "The image format is illegal and cannot be opened.", "rejected"),
    (400, "invalid_parameter_error", "Range of max_tokens should be [1, 8192]", "rejected"),
    (400, "InvalidParameter", "unknown field 'requests per minute'", "rejected"),
    (401, "InvalidApiKey", "Invalid API-key provided.", "unauthorized"),
    (403, "Model.AccessDenied", "Model access denied.", "rejected"),
    (404, "ModelNotFound", "Model can not be found.", "rejected"),
]


@pytest.mark.parametrize("shape", [openai_shape, native_shape])
@pytest.mark.parametrize(("status", "code", "message", "expected"), DASHSCOPE)
def test_every_dashscope_code_has_the_same_meaning_in_both_formats(status, code, message, expected, shape):
    body = shape(code, message)
    error = classify(status, {}, body)
    assert meaning_of(error) == expected
    assert (error.status, error.code, error.body) == (status, code, body)


OTHERS = [
    # From OpenAI's guide "Error codes", and texts that its users have quoted.
    (429, {"message": f"{QUOTA} For more information, read the docs: https://platform.openai.com/docs",
           "type": "insufficient_quota", "param": None, "code": "insufficient_quota"}, "billing"),
    (429, {"message": QUOTA, "type": "insufficient_quota", "param": None, "code": None}, "billing"),
    (429, {"message": "Rate limit reached for gpt-4o in organization org-1 on tokens per min (TPM): Limit 30000.",
           "type": "tokens", "code": "rate_limit_exceeded"}, "token_rate"),
    (429, {"message": "Rate limit reached for gpt-4o on requests per min (RPM): Limit 3, Used 3. Please try again.",
           "type": "requests", "code": "rate_limit_exceeded"}, "request_rate"),
    (429, {"message": "Rate limit reached for gpt-4o on tokens per min.", "code": "rate_limit_exceeded"}, "token_rate"),
    (429, {"message": "Rate limit reached on requests per day (RPD)", "code": "rate_limit_exceeded"}, "quota_period"),
    (429, {"message": "Requests to this API have exceeded token rate limit of your current tier.", "code": "429"},
     "token_rate"),
    (429, {"message": "Requests to this API have exceeded call rate limit of your current tier.", "code": "429"},
     "request_rate"),
    (400, {"message": "Rejected by our safety system.", "code": "content_policy_violation"}, "moderated"),
    (402, {"message": "Insufficient Balance", "code": "invalid_request_error"}, "billing"),
    (400, {"message": "no such field", "type": "invalid_request_error", "code": None}, "rejected"),
    (529, {"message": "Overloaded", "type": "overloaded_error"}, "capacity"),
    (429, {"message": "Max parallel request limit reached", "code": None}, "concurrency"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "error", "expected"), OTHERS)
def test_errors_of_other_openai_compatible_servers_are_classified(status, error, expected):
    assert meaning_of(classify(status, {}, json.dumps({"error": error}).encode())) == expected


BODIES = [
    (429, b"", "unknown"),
    (429, b"<html><h1>429 Too Many Requests</h1></html>", "unknown"),
    (429, b"\xff\xfe\x00", "unknown"),
    (429, b"local_rate_limited", "request_rate"),  # Envoy's own text
    (429, b'{"error": "Model is overloaded", "error_type": "overloaded"}', "capacity"),  # TGI
    (503, b"Request dropped due to backpressure (num_queued_requests=9, max_queued_requests=9).", "concurrency"),  # Ray
    (503, b'{"error": {"message": "The request queue is full.", "type": "x", "code": 503}}', "concurrency"),  # SGLang
    (503, b"<html>503 Service Unavailable</html>", "server"),
    (503, b"", "server"),
    (502, b"upstream connect error", "server"),
    (529, b"", "capacity"),
    (408, b"", "server"),
    (404, b'{"detail": "Not Found"}', "rejected"),
    (400, b'{"object":"error","message":"max_model_len is 4096","type":"BadRequestError","code":400}', "rejected"),
    (413, b"<html>413</html>", "rejected"),
]


@pytest.mark.parametrize(("status", "body", "expected"), BODIES)
def test_errors_in_plain_text_in_web_pages_and_without_a_body_are_classified(status, body, expected):
    assert meaning_of(classify(status, {}, body)) == expected


IN_STREAM = [
    (
        429,
        b'{"code":"Throttling.RateQuota","message":"Requests rate limit exceeded","request_id":"r"}',
        "request_rate",
        429,
    ),
    (400, b'{"code":"DataInspectionFailed","message":"Output data may contain\xe2\x80\xa6"}', "moderated", 400),
    (0, b'{"error":{"code":"limit_burst_rate","message":"too quickly"},"request_id":"r"}', "growth", 429),
    (0, b'{"error":{"code":"insufficient_quota","message":"Allocated quota exceeded"}}', "token_rate", 429),
    (0, b'{"error":{"code":"internal_error","details":"Allocated quota exceeded, please"}}', "token_rate", 429),
    (0, b'{"error":{"code":"ModelUnavailable","message":"Model is unavailable"}}', "capacity", 503),
    (0, b'{"error":{"code":"Arrearage","message":"x"}}', "billing", 403),
    (0, b'{"error":{"code":"data_inspection_failed","message":"x"}}', "moderated", 400),
    (0, b'{"error":{"object":"error","message":"bad","type":"BadRequestError","code":400}}', "rejected", 400),
    (0, b'{"object":"error","message":"engine died","type":"InternalServerError","code":500}', "server", 500),
    (0, b'{"error":{"message":"something"}}', "server", 502),
    (200, b'{"error":{"code":"limit_requests","message":"x"}}', "request_rate", 429),
]


@pytest.mark.parametrize(("status", "data", "expected", "shown"), IN_STREAM)
def test_an_error_inside_a_stream_has_the_same_meaning_and_gets_a_status(status, data, expected, shown):
    error = classify(status, {}, data)
    assert (meaning_of(error), error.status) == (expected, shown)


def test_the_message_has_the_code_and_our_own_sentence_and_the_quote_is_one_bounded_line():
    error = classify(400, {}, openai_shape("InvalidParameter", "first\nsecond\r\n" + "x" * 10_000))
    assert error.message == (
        "the provider answered 400 (InvalidParameter): it does not accept this request; its request id is r-1"
    )
    assert error.quote.startswith("first second x")
    assert len(error.quote) <= 300


def test_a_code_that_is_a_sentence_is_not_shown():
    error = classify(429, {}, json.dumps({"code": "my secret street", "error": "Too many"}).encode())
    assert (error.code, "secret" in error.message) == ("", False)


def test_an_error_has_only_the_headers_that_may_be_forwarded():
    headers = {"Content-Type": "application/json", "X-Request-Id": "r", "Set-Cookie": "a=b", "Connection": "close"}
    error = classify(400, headers, b"{}")
    assert error.headers == {"Content-Type": "application/json", "X-Upstream-Request-Id": "r"}
    assert error.upstream_request_id == "r"


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["error", "code", "message", "type", "detail", "details", "msg", "request_id", "object"])
            | st.text(),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(
    status=st.integers(-1, 700),
    headers=st.dictionaries(st.sampled_from(["Retry-After", "retry-after-ms", "Date", "X"]) | st.text(), st.text()),
    body=st.binary() | anything.map(lambda value: json.dumps(value).encode()),
)
def test_garbage_is_classified_and_never_raises(status, headers, body):
    error = classify(status, headers, body)
    assert meaning_of(error)
    assert error.body == body
    assert error.status >= 400
    if status == 429 and isinstance(error, Throttled) and error.retry_after is not None:
        assert math.isfinite(error.retry_after)


@given(body=st.binary(max_size=20))
def test_a_429_with_an_unreadable_body_is_throttling_of_unknown_kind(body):
    error = classify(429, {}, b"\xff" + body)
    assert isinstance(error, Throttled)


def test_a_throttled_error_has_the_wait_that_the_provider_asked_for():
    error = classify(429, {"Retry-After": "3"}, b"")
    assert isinstance(error, Throttled)
    assert error.retry_after == 3.0

"""The classification of provider errors, in all their formats."""

from __future__ import annotations

import json
import math
import time

import pytest
from answer_readings import meaning_of
from hypothesis import given
from hypothesis import strategies as st

from backends.base import QuotaUsedUp, Rejected, Throttled, Unauthorized
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
    assert error.message == "the provider answered 400 (InvalidParameter): it does not accept this request"
    assert error.upstream_request_id == "r-1"
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


# -- the rules in their order: each row was read wrongly by an earlier version -----------------------------------------


def google(quota: str, delay: str = "17s", text: str = "check your plan and billing details") -> dict:
    details = [
        {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [{"quotaId": quota}]},
        {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay},
    ]
    return {"error": {"code": 429, "message": text, "status": "RESOURCE_EXHAUSTED", "details": details}}


def said(text: str, code: object = None, **more: object) -> dict:
    return {"error": {"message": text, "code": code, **more}}


RULES: list[tuple[str, int, dict[str, str], object, str]] = [
    # B1: Google writes "billing details" beside every limit; the quota's name decides.
    ("B1", 429, {}, google("RequestsPerMinutePerModel"), "request_rate"),
    ("B1 in a list", 429, {}, [google("InputTokensPerModelPerMinute")], "token_rate"),
    ("B1 a day", 429, {}, google("RequestsPerDayPerProject"), "quota_period"),
    ("B1 no name", 429, {}, said("See your billing details", status="RESOURCE_EXHAUSTED"), "unknown"),
    ("billing details with a short wait", 429, {"Retry-After": "9"}, said("See your billing details"), "unknown"),
    ("billing details", 429, {}, said("See your billing details"), "billing"),
    # B2: lack of money at other statuses
    ("B2", 403, {}, said("x", "AccountOverdueError"), "billing"),
    ("B2", 403, {}, said("quota", "insufficient_user_quota"), "billing"),
    ("B2", 403, {}, {"code": 30001, "message": "x"}, "billing"),
    ("B2", 412, {}, said("Account x is suspended, maybe for failure to pay past invoices"), "billing"),
    ("B2 in a 500", 500, {}, {"error": {"message": "failed (1008)"}}, "billing"),
    ("words do not count in a 500", 500, {}, said("insufficient balance in the pool of workers"), "server"),
    # B3: lack of money as 429, with other wording
    ("B3", 429, {}, said("You have run out of credits."), "billing"),
    ("B3", 429, {}, said("x", "1113"), "billing"),
    ("B3", 429, {}, said("x", type="budget_exceeded"), "billing"),
    ("B3", 429, {}, said("账户余额不足"), "billing"),
    ("B3", 429, {}, said("The spending limit has been reached"), "billing"),
    ("B3", 402, {}, said("anything"), "billing"),
    ("money that returns", 402, {}, said("In-flight budget exceeded"), "concurrency"),
    # B4: the quota of a long period
    ("B4", 429, {}, said("Limit on requests per day (RPD) reached", type="requests"), "quota_period"),
    ("B4", 429, {}, said("reached organization TPD rate limit"), "quota_period"),
    ("B4", 429, {}, said("Rate limit exceeded: free-models-per-day"), "quota_period"),
    ("B4", 429, {}, said("x", "1310"), "quota_period"),
    ("B4", 429, {}, said("该模型今日调用次数已达上限"), "quota_period"),
    ("B4", 429, {}, said("Rate limit of 50 per 86400s exceeded"), "quota_period"),
    ("B4", 403, {}, said("Out of call volume quota"), "quota_period"),
    ("B4 IETF", 429, {"RateLimit-Policy": '"day";q=9;w=86400', "RateLimit": '"day";r=0;t=60'}, "", "quota_period"),
    ("B4 a number alone", 429, {"Retry-After": "86400"}, said("Too many requests"), "unknown"),
    # B5: too large for the limit at all
    ("B5", 429, {}, said("Too large: Limit 30000, Requested 70,000", type="tokens"), "rejected"),
    ("B5", 429, {}, said("Limit 30000, Used 20000, Requested 11000", type="tokens"), "token_rate"),
    ("B5", 413, {}, said("Request too large for tokens per minute", type="tokens"), "rejected"),
    ("B5", 429, {}, said("The input tokens must be reduced", type="tokens"), "rejected"),
    ("B5 money", 402, {}, said("You requested up to 900 tokens, but can only afford 700"), "rejected"),
    ("B5 no money at all", 402, {}, said("You requested up to 900 tokens, but can only afford 0"), "billing"),
    # B6, B7: load
    ("B6", 503, {"x-envoy-overloaded": "true"}, "upstream connect error", "concurrency"),
    ("B6", 503, {}, "upstream connect error. reset reason: overflow", "concurrency"),
    ("B6", 503, {}, said("server busy, please try again. maximum pending requests exceeded"), "concurrency"),
    ("B6", 503, {}, said("server busy, please try again."), "capacity"),
    ("B6", 503, {}, said("Loading model"), "capacity"),
    ("B6", 498, {}, said("x", "capacity_exceeded"), "capacity"),
    ("B7", 503, {"Retry-After": "120"}, "<html>", "capacity"),
    ("B7 without", 503, {}, "<html>", "server"),
    # B8: the caller's words
    ("B8 a quote", 400, {}, said("cannot open 'the-bill is overdue, insufficient balance'"), "rejected"),
    ("B8 a file", 400, {}, said("cannot open insufficient-credits.is overdue.jpg"), "rejected"),
    ("B8 a URL", 400, {}, said("cannot fetch https://x.example/payment required"), "rejected"),
    ("B8 a field", 400, {}, said("messages: please recharge", param="messages"), "rejected"),
    ("B8 a value", 400, {}, said("Invalid image, got: please recharge"), "rejected"),
    ("B8 the code", 400, {}, said("the text insufficient balance is no image", "InvalidParameter"), "rejected"),
    ("B8 FastAPI", 422, {}, {"detail": [{"loc": ["body"], "msg": "bad", "input": "insufficient balance"}]}, "rejected"),
    ("B8 the provider's own", 400, {}, said("Your credit balance is too low"), "billing"),
    # Machine facts before prose
    ("actual/limit", 429, {}, said("Tokens per Minute (actual/limit): 9/50, Requests per Second (actual/limit): 2/2"),
     "request_rate"),
    ("a dotted tail", 429, {}, said("tpm/rpm", "RateLimitExceeded.EndpointTPMExceeded"), "token_rate"),
    ("rate_limit_type", 429, {"rate_limit_type": "tokens"}, said("No."), "token_rate"),
    ("policy-id", 429, {"policy-id": "DeploymentRatelimit-Call"}, said("No."), "request_rate"),
    # The key
    ("the key", 401, {}, said("x"), "unauthorized"),
    ("the key as 400", 400, {}, said("x", details=[{"reason": "API_KEY_INVALID"}]), "unauthorized"),
    ("no key", 403, {}, said("Country not supported"), "rejected"),
    ("a quota as 403", 403, {}, said("The quota of this key is exhausted"), "quota_period"),
    ("a rate as 403", 403, {}, said("x", details=[{"reason": "rateLimitExceeded"}]), "unknown"),
    ("an unbought model", 403, {}, said("Access denied", "AccessDenied.Unpurchased"), "billing"),
    ("the head of a code", 400, {}, said("please recharge", "InvalidParameter.Image"), "rejected"),
    ("a day's header", 429, {"x-ratelimit-remaining-requests-day": "0", "x-ratelimit-remaining-tokens-minute": "7"},
     said("Rate limit exceeded"), "quota_period"),
    ("both headers", 429, {"x-ratelimit-remaining-day": "0", "x-ratelimit-remaining-minute": "0"},
     said("API rate limit exceeded"), "request_rate"),
    ("connections", 503, {}, said("Too many connections"), "concurrency"),
    ("a full queue", 503, {}, "pending request queue full", "concurrency"),
    ("flow control", 403, {}, "Throttled by flow control", "unknown"),
    ("a leaked key", 403, {}, said("This API key was reported as leaked"), "unauthorized"),
    ("a suspended project", 403, {}, said("The project has been suspended"), "billing"),
    ("slower growth", 429, {}, said("Above the usage increase rate for tokens per minute"), "growth"),
    ("this month", 403, {}, said("Tokens quota reached this month", "token_quota_reached"), "quota_period"),
    # Chinese words about load
    ("频率", 429, {}, said("请求频率过高"), "request_rate"),
    ("并发", 429, {}, said("已达到并发上限"), "concurrency"),
    ("饱和", 429, {}, said("上游负载已饱和", "insufficient_quota"), "capacity"),
    # Envelopes
    ("errors[0]", 429, {}, {"errors": [{"message": "neurons", "code": 4006}]}, "quota_period"),
    ("detail{}", 429, {}, {"detail": {"status": "too_many_concurrent_requests"}}, "concurrency"),
    ("base_resp", 0, {}, {"base_resp": {"status_code": 1002}}, "request_rate"),
    ("wrapped as text", 429, {}, said("AzureException - {'error': {'message': 'the token rate limit of x'}}"),
     "token_rate"),
    ("raw JSON", 429, {}, said("Error", metadata={"raw": '{"error": {"code": "limit_burst_rate"}}'}), "growth"),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule[0])
def test_each_rule_in_its_place(rule):
    _, status, headers, body, expected = rule
    raw = body.encode() if isinstance(body, str) else json.dumps(body, ensure_ascii=False).encode()
    assert meaning_of(classify(status, headers, raw)) == expected


#: What must not be taken for a refusal by a limit, by the account or of the key.
HARMLESS = [
    (400, "Unsupported value: 'temperature' does not support 0.2 with this model."),
    (400, "This model does not support image input."),
    (400, "Invalid 'messages[0].content[1].image_url.url': expected a base64-encoded data URL."),
    (400, "max_tokens must be at most 4096 tokens per request"),
    (400, "The token limit of this model is 8192 tokens, but 9000 were given."),
    (400, "image exceeds 5 MB maximum: 7000000 bytes > 5242880 bytes"),
    (400, "Could not process image: decoder busy"),
    (400, "At most 4 images are allowed per request."),
    (400, "The number of requests in a batch must not exceed 10 per minute of video."),
    (400, "User location is not supported for the API use."),
    (400, "tool_choice requires the option enable-auto-tool-choice"),
    (403, "You do not have access to this model."),
    (403, "Project p does not have access to model m"),
    (403, "Your organization must be verified to use this model."),
    (403, "Model access denied."),
    (404, "The model m does not exist or you do not have access to it."),
    (404, "Not Found"),
    (413, "Request Entity Too Large"),
    (422, "Input should be a valid list"),
]
FAILURES = [
    (500, "Internal server error"),
    (500, "CUDA out of memory. Tried to allocate 2 GiB"),
    (500, "java.util.concurrent.TimeoutException: null"),
    (500, "The server had an error while processing your request"),
    (500, "context deadline exceeded"),
    (502, "Bad gateway"),
    (503, "upstream connect error or disconnect/reset before headers. reset reason: connection failure"),
    (503, "no healthy upstream"),
    (504, "upstream request timeout"),
    (424, "Request failed during generation"),
]


@pytest.mark.parametrize(("status", "text"), [*HARMLESS, *FAILURES])
def test_ordinary_errors_are_no_refusals(status, text):
    expected = "rejected" if (status, text) in HARMLESS else "server"
    for body in (said(text), {"detail": text}, {"object": "error", "message": text, "code": status}, text):
        raw = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        assert meaning_of(classify(status, {}, raw)) == expected


def test_words_that_the_request_contains_prove_nothing():
    refusal = json.dumps(said("Not a picture: please recharge your account")).encode()
    assert meaning_of(classify(400, {}, refusal)) == "billing"
    request = b'{"messages": [{"content": "Please Recharge your account"}]}'
    assert meaning_of(classify(400, {}, refusal, request_body=request)) == "rejected"
    chinese = json.dumps(said("图片无法读取 账户余额不足")).encode()
    for request in (json.dumps("余额不足").encode(), "余额不足".encode()):
        assert meaning_of(classify(400, {}, chinese, request_body=request)) == "rejected"


def test_a_request_that_is_too_large_gets_413_and_teaches_nothing():
    error = classify(429, {}, json.dumps(said("Limit 10, Requested 20")).encode())
    assert isinstance(error, Rejected)
    assert (error.status, error.above_limit) == (413, True)
    error = classify(402, {}, json.dumps(said("can only afford 20")).encode())
    assert isinstance(error, Rejected)
    assert (error.status, error.above_limit) == (402, True)


def test_the_end_of_a_long_period_is_reported_and_a_short_delay_beside_it_is_not():
    far = classify(429, {"Retry-After": "7200"}, json.dumps(said("requests per day")).encode())
    near = classify(429, {}, json.dumps(google("RequestsPerDay", "18s")).encode())
    assert isinstance(far, QuotaUsedUp)
    assert isinstance(near, QuotaUsedUp)
    assert (far.ends_in, near.ends_in) == (7200, None)


def test_a_refused_key_is_a_rejection_of_its_own_kind():
    assert isinstance(classify(401, {}, b""), Unauthorized)


def test_no_text_of_the_provider_is_in_the_message():
    body = json.dumps({"error": {"message": "the secret street", "code": "odd", "type": "secret type"}}).encode()
    for status in (400, 402, 403, 429, 500):
        error = classify(status, {}, body)
        assert "secret" not in error.message
        assert error.quote == "the secret street"


@pytest.mark.parametrize(
    "text", ["1h", "a/b.", "'", '"', "try again in 5", "no api ", "limit: 5 ", "{'message': '", "5 小"]
)
def test_no_text_takes_long_to_read(text):
    """Patterns with several ways to match would take minutes. The bound is wide, because the machine may be busy."""
    body = json.dumps(said(text * (4000 // len(text)))).encode()
    headers = {"ratelimit-policy": '"' * 8000, "retry-after": "1h" * 4000}
    started = time.perf_counter()
    for status in (400, 403, 429, 503):
        classify(status, headers, body)
    assert time.perf_counter() - started < 2.0

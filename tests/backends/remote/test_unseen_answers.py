"""Answers of providers that the rules were not written for: they were written down before the rules were tried on them.

Each row: sender, status, headers, body, the meanings that are right, and the wait in seconds that the answer names.
"""

from __future__ import annotations

import json

import pytest
from answer_readings import meaning_of, wait_of

from backends.remote.refusals import classify

ANSWERS: list[tuple[str, int, dict[str, str], object, str, float | None]] = [
    ("Cohere", 429, {}, {"message": "You are using a Trial key, which is limited to 10 API calls / minute."},
     "request_rate", None),
    ("Cohere", 429, {}, {"message": "You are using a Trial key, which is limited to 1000 API calls / month. You can "
                                    "upgrade to a Production key."}, "quota_period", None),
    ("Cerebras", 429, {}, {"message": "Tokens per minute limit exceeded - too many tokens processed.",
                           "type": "too_many_tokens_error", "param": "quota", "code": "token_quota_exceeded"},
     "token_rate", None),
    ("Cerebras", 429, {}, {"message": "Tokens per day limit exceeded - too many tokens processed.",
                           "type": "too_many_tokens_error", "param": "quota", "code": "token_quota_exceeded"},
     "quota_period", None),
    ("Cerebras", 429, {}, {"message": "We're experiencing high traffic right now! Please try again soon.",
                           "type": "too_many_requests_error", "param": "queue", "code": "queue_exceeded"},
     "capacity concurrency", None),
    ("Perplexity", 401, {}, {"error": {"message": "You exceeded your current quota, please check your plan and billing "
                                                  "details", "type": "insufficient_quota", "code": 401}},
     "billing", None),
    ("Ollama", 503, {}, {"error": "server busy, please try again.  maximum pending requests exceeded"},
     "concurrency capacity", None),
    ("llama.cpp", 503, {}, {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}},
     "capacity", None),
    ("llama.cpp", 503, {}, {"error": "no slot available"}, "capacity concurrency", None),
    ("TGI", 422, {}, {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 4090 "
                               "`inputs` tokens and 20 `max_new_tokens`", "error_type": "validation"}, "rejected", None),
    ("Hugging Face", 429, {}, {"error": "Rate limit reached. You reached free usage limit (reset hourly). Please "
                                        "subscribe to a plan at https://huggingface.co/pricing"}, "quota_period", None),
    ("Hugging Face", 503, {}, {"error": "Model Qwen/Qwen2-VL-7B-Instruct is currently loading", "estimated_time": 20.0},
     "capacity", None),
    ("Vertex", 429, {}, {"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message":
        "Quota exceeded for aiplatform.googleapis.com/generate_content_requests_per_minute_per_project_per_base_model "
        "with base model: gemini-pro-vision. Please submit a quota increase request."}}, "request_rate", None),
    ("Google", 403, {}, {"error": {"code": 403, "status": "PERMISSION_DENIED", "message":
        "This API method requires billing to be enabled. Please enable billing on project #1 by visiting the console.",
        "details": [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "BILLING_DISABLED"}]}},
     "billing", None),
    ("Google", 429, {}, [{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "Quota exceeded for quota "
        "metric 'Generate Content API requests per minute'.", "details": [
            {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "RATE_LIMIT_EXCEEDED", "metadata":
             {"quota_limit": "GenerateContentRequestsPerMinutePerProjectPerRegion", "quota_unit": "1/min/{project}"}},
            {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "22.5s"}]}}], "request_rate", 22.5),
    ("Tencent", 200, {}, {"Response": {"Error": {"Code": "RequestLimitExceeded", "Message": "请求频率超过限制"},
                                       "RequestId": "x"}}, "request_rate unknown", None),
    ("Tencent", 400, {}, {"error": {"message": "资源包余量已用尽,请购买资源包或开通后付费", "type": "runtime_error",
                                    "code": "FailedOperation.ResourcePackExhausted"}}, "billing", None),
    ("Baidu v1", 200, {}, {"error_code": 18, "error_msg": "Open api qps request limit reached"}, "request_rate", None),
    ("Baidu v1", 200, {}, {"error_code": 17, "error_msg": "Open api daily request limit reached"},
     "quota_period", None),
    ("Baidu v1", 200, {}, {"error_code": 336502, "error_msg": "Rate limit reached for TPM"}, "token_rate", None),
    ("DeepInfra", 402, {}, {"detail": {"error": "inference prohibited, please enter a payment method"}},
     "billing", None),
    ("DeepInfra", 429, {}, {"detail": {"error": "Model busy, retry later"}}, "capacity", None),
    ("Replicate", 429, {}, {"detail": "Request was throttled. Expected available in 3 seconds."}, "unknown", 3),
    ("Databricks", 429, {}, {"error_code": "REQUEST_LIMIT_EXCEEDED", "message": "REQUEST_LIMIT_EXCEEDED: Exceeded "
        "workspace input tokens per minute rate limit for databricks-llama."}, "token_rate", None),
    ("Bedrock", 429, {"x-amzn-errortype": "ModelNotReadyException"},
     {"message": "The model specified is not ready for serving inference requests"}, "capacity unknown", None),
    ("Anthropic", 413, {}, {"type": "error", "error": {"type": "request_too_large",
        "message": "Request exceeds the maximum size"}}, "rejected", None),
    ("GitHub Models", 429, {"retry-after": "36012"}, {"error": {"code": "RateLimitReached", "message":
        "Rate limit of 50 per 86400s exceeded for UserByModelByDay. Please wait 36012 seconds before retrying."}},
     "quota_period", 36012),
    ("GitHub Models", 429, {}, {"error": {"code": "RateLimitReached", "message":
        "Rate limit of 10 per 60s exceeded for UserByModelByMinute. Please wait 12 seconds before retrying."}},
     "request_rate unknown", 12),
    ("GitHub Models", 429, {}, {"error": {"code": "RateLimitReached", "message":
        "Rate limit of 2 per 0s exceeded for UserConcurrentRequests. Please wait 0 seconds before retrying."}},
     "concurrency", 0),
    ("GitHub Models", 413, {}, {"error": {"code": "tokens_limit_reached", "message":
        "Request body too large for gpt-4o-mini model. Max size: 8000 tokens."}}, "rejected", None),
    ("Novita", 403, {}, {"code": 403, "reason": "NOT_ENOUGH_BALANCE", "message": "not enough balance"},
     "billing", None),
    ("Vercel", 402, {}, {"error": {"message": "Insufficient funds. Please add credits to your account to continue.",
                                   "type": "insufficient_funds"}}, "billing", None),
    ("Traefik", 429, {"x-retry-in": "2.5s", "content-type": "text/plain"}, "Too Many Requests", "unknown", None),
    ("Istio", 503, {}, "no healthy upstream", "server", None),
    ("Cloud Run", 429, {}, "Rate exceeded.", "unknown capacity", None),
    ("Cloud Run", 500, {}, "The request was aborted because there was no available instance.", "capacity", None),
    ("vLLM", 400, {}, {"object": "error", "message": "This model's maximum context length is 8192 tokens. However, you "
        "requested 10234 tokens. Please reduce the length of the messages.", "type": "BadRequestError", "code": 400},
     "rejected", None),
    ("Ark", 429, {}, {"error": {"code": "SetLimitExceeded", "message": "Your account [1] has reached the set inference "
        "limit for the [doubao] model, and the model service has been paused.", "type": "TooManyRequests"}},
     "billing quota_period", None),
    ("Zhipu", 429, {}, {"error": {"code": "1308", "message": "已达到 5 小时的使用上限。您的限额将在 2026-12-01 重置。"}},
     "quota_period", None),
    ("gateway", 429, {}, {"error": {"message": "请求过于频繁，请稍后再试"}}, "request_rate unknown", None),
    ("gateway", 429, {}, {"error": {"message": "并发数超过限制，当前并发 5"}}, "concurrency", None),
    ("gateway", 403, {}, {"error": {"message": "您的账户已欠费，请前往控制台充值", "code": "Forbidden"}}, "billing", None),
    ("gateway", 429, {}, {"error": {"message": "今日免费额度已用完，请明天再试"}}, "quota_period", None),
    ("gateway", 503, {}, {"error": {"message": "系统繁忙，请稍后再试"}}, "capacity", None),
    ("gateway", 401, {}, {"error": {"message": "无效的令牌"}}, "unauthorized", None),
    ("a quoted URL", 400, {}, {"error": {"code": "DownloadError", "message":
        "Failed to download https://cdn.example/insufficient balance/arrears.jpg"}}, "rejected", None),
    ("a quoted prompt", 400, {}, {"error": {"message": "invalid content: 'your credit balance is too low, rate limit "
        "reached per day'", "type": "invalid_request_error", "param": "messages"}}, "rejected", None),
    ("OpenAI", 401, {}, {"error": {"message": "Incorrect API key provided: sk-1***9.", "type": "invalid_request_error",
                                   "code": "invalid_api_key"}}, "unauthorized", None),
    ("OpenAI", 403, {}, {"error": {"message": "Country, region, or territory not supported",
                                   "code": "unsupported_country_region_territory"}}, "rejected", None),
    ("OpenAI", 429, {}, {"error": {"message": "Resource is temporarily unavailable for flex processing.",
                                   "code": "resource_unavailable"}}, "capacity unknown", None),
    ("OpenAI", 503, {}, {"error": {"message": "Slow down", "code": "slow_down"}}, "growth capacity", None),
    ("xAI", 400, {}, {"code": "Client specified an invalid argument", "error": "Incorrect API key provided: xa***y."},
     "unauthorized", None),
]  # fmt: skip


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: f"{answer[0]}-{answer[1]}")
def test_an_answer_that_no_rule_was_written_for_is_read_as_its_sender_means_it(answer):
    _, status, headers, body, right, wait = answer
    raw = body.encode() if isinstance(body, str) else json.dumps(body, ensure_ascii=False).encode()
    error = classify(status if status >= 400 else 0, headers, raw)
    assert meaning_of(error) in right.split()
    assert wait is None or wait_of(error) == pytest.approx(wait)

"""What callers get, and what others can see, when a provider answers in an unusual way; from end to end."""

from __future__ import annotations

import json

import pytest
from running import chat
from scripted_upstream import CHAT_ANSWER

pytestmark = pytest.mark.http


def answering(*answers):
    """Answer each request with the next (status, body, headers) of the list, and later ones with the last."""
    sent = 0

    async def script(link, _):
        nonlocal sent
        status, body, headers = answers[min(sent, len(answers) - 1)]
        sent += 1
        await link.answer(body, status=status, headers=headers)

    return script


async def ask(sidecar, **more):
    async with sidecar.post(chat(**more)) as response:
        return response.status, await response.read(), response.headers


async def status_of(sidecar):
    async with sidecar.client.get(f"{sidecar.admin_url}/status") as response:
        return await response.text()


@pytest.mark.parametrize("body", [b"<html>login</html>", b"{}", b'{"choices": []}'])
async def test_a_complete_200_without_an_answer_is_asked_for_once(serving, scripted, body):
    upstream = await scripted(answering((200, body, "")))
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    status, raw, _ = await ask(sidecar)
    assert (status, json.loads(raw)["error"]["code"]) == (502, "upstream_error")
    assert len(upstream.seen) == 1


async def test_a_200_with_nan_reaches_the_caller_unchanged(serving, scripted):
    body = json.dumps({**CHAT_ANSWER, "logprob": float("-inf")}).encode()
    upstream = await scripted(answering((200, body, "")))
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    status, raw, _ = await ask(sidecar)
    assert (status, raw, len(upstream.seen)) == (200, body, 1)


async def test_a_refusal_inside_a_200_is_sent_again_and_the_caller_sees_only_the_answer(serving, scripted):
    refusal = {"choices": None, "base_resp": {"status_code": 1002, "status_msg": "rate limit"}}
    upstream = await scripted(answering((200, refusal, ""), (200, CHAT_ANSWER, "")))
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    status, raw, _ = await ask(sidecar)
    assert (status, json.loads(raw), len(upstream.seen)) == (200, CHAT_ANSWER, 2)
    assert (await sidecar.metrics())['sidecar_throttles_total{backend="dashscope",kind="request_rate"}'] == 1


async def test_a_request_that_is_too_large_for_the_limit_gets_413_once_and_teaches_nothing(serving, scripted):
    refusal = {"error": {"message": "Limit 30000, Requested 70000", "type": "tokens", "code": "rate_limit_exceeded"}}
    upstream = await scripted(answering((429, refusal, ""), (200, CHAT_ANSWER, "")))
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    status, raw, _ = await ask(sidecar)
    assert (status, json.loads(raw), len(upstream.seen)) == (413, refusal, 1)
    assert (await ask(sidecar))[0] == 200
    assert not [name for name in await sidecar.metrics() if name.startswith("sidecar_throttles_total")]


async def test_a_used_up_quota_is_answered_at_once_with_its_end(serving, scripted):
    refusal = {"error": {"message": "Limit on requests per day", "code": "rate_limit_exceeded"}}
    upstream = await scripted(answering((429, refusal, "Retry-After: 7200\r\n")))
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    status, raw, headers = await ask(sidecar)
    assert (status, json.loads(raw)["error"]["code"]) == (503, "upstream_quota_used_up")
    assert headers["Retry-After"] == "7200"
    assert len(upstream.seen) == 1
    assert (await sidecar.metrics())['sidecar_throttles_total{backend="dashscope",kind="quota_period"}'] == 1


async def test_a_providers_quote_of_a_callers_text_concerns_nobody_else(serving, scripted):
    quoted = "the account balance is too low, please recharge: my street 7"
    refusal = {"error": {"message": f"cannot read {quoted}", "code": None}}
    upstream = await scripted(answering((400, refusal, ""), (200, CHAT_ANSWER, "")))
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    async with sidecar.post(chat(quoted)) as response:
        assert (response.status, await response.json()) == (400, refusal)
    assert (await ask(sidecar))[0] == 200
    assert "street" not in await status_of(sidecar)


@pytest.mark.parametrize("status", [400, 402, 500])
async def test_a_providers_text_is_shown_to_the_caller_of_the_request_and_not_in_the_status_or_the_log(
    serving, scripted, status, caplog
):
    caplog.set_level("DEBUG")
    upstream = await scripted(
        answering((status, {"error": {"message": "about my street 7"}}, "X-Request-Id: up-7\r\n"))
    )
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    _, raw, headers = await ask(sidecar)
    assert b"street" in raw
    assert headers["X-Upstream-Request-Id"] == "up-7"
    assert "street" not in await status_of(sidecar) + caplog.text


async def test_the_upstreams_request_id_is_in_the_answer_too(serving, scripted):
    upstream = await scripted(answering((200, CHAT_ANSWER, "x-request-id: up-8\r\n")))
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    headers = (await ask(sidecar))[2]
    assert headers["X-Upstream-Request-Id"] == "up-8"
    assert headers["X-Request-Id"] != "up-8"


async def test_an_error_page_becomes_an_error_in_the_apis_format(serving, scripted):
    upstream = await scripted(answering((404, b"<html>Not Found</html>", "")))
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    status, raw, _ = await ask(sidecar)
    assert (status, json.loads(raw)["error"]["type"]) == (404, "invalid_request_error")


async def test_a_stream_that_ends_in_the_middle_ends_with_an_error_event_and_counts_as_an_error(serving, scripted):
    async def script(link, _):
        await link.start_stream()
        await link.chunk(b'data: {"choices":[{"delta":{"content":"A ga"}}]}\n\n')
        await link.chunk(b"")

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    status, raw, _ = await ask(sidecar, stream=True)
    assert status == 200
    assert raw.count(b'"code":"upstream_error"') == 1
    await sidecar.until(sidecar.at_rest)
    assert (await sidecar.metrics())['sidecar_requests_total{api="openai",backend="dashscope",outcome="error"}'] == 1
    assert len(upstream.seen) == 1


async def test_the_access_log_names_the_upstreams_request_id(serving, scripted, caplog):
    caplog.set_level("INFO")
    name = "3f1c9a52-77de-9b0e-a2c4-f08d11e2b6aa"
    upstream = await scripted(answering((400, {"error": {"message": "x"}}, f"x-request-id: {name}\r\n")))
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", access_log=True)
    await ask(sidecar)
    await sidecar.until(lambda: [r for r in caplog.records if getattr(r, "upstream_request_id", "") == name])


async def test_headers_that_are_no_limits_cost_no_permit_and_no_answer(serving, scripted):
    async def odd(link, seen):
        reset = ("-5s", "1e999s", "nans")[len(upstream.seen) % 3]
        values = {"Limit": "70", "Remaining": "0", "Reset": reset}
        headers = "".join(f"X-RateLimit-{name}: {value}\r\n" for name, value in values.items())
        await link.answer(CHAT_ANSWER, headers=headers)

    upstream = await scripted(odd)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    for _ in range(6):
        async with sidecar.post() as response:
            assert response.status == 200
    await sidecar.until(sidecar.at_rest)
    async with sidecar.client.get(f"{sidecar.admin_url}/status") as response:
        assert response.status == 200


async def test_a_provider_that_repeats_the_key_or_a_prompt_in_odd_places_tells_nobody_else(serving, scripted, caplog):
    async def telling(link, seen):
        if len(upstream.seen) % 2:
            body = {"error": {"message": "x", "code": "sk-of-the-account"}}
            await link.answer(body, status=429, headers="X-Request-Id: sk-of-the-account\r\n")
        else:
            await link.answer(b"tea", content_type="the prompt was: who hides in the pantry")

    upstream = await scripted(telling)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", dashscope_api_key="sk-of-the-account")
    for _ in range(4):
        async with sidecar.post(headers={"X-Request-Timeout": "1"}) as response:
            shown = f"{response.headers} {await response.text()} {caplog.text}"
        for path in ("/status", "/readyz"):
            async with sidecar.client.get(sidecar.admin_url + path) as response:
                shown += await response.text()
        assert "sk-of-the-account" not in shown
        assert "pantry" not in shown

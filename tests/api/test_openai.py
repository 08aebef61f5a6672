"""The OpenAI-compatible API over real sockets: bodies and headers in both directions, and the official client."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
from running import CHAT, chat
from scripted_upstream import CHAT_ANSWER, Link, Seen


@pytest.fixture
def client_of():
    """Return a function that creates the official client for a sidecar, without retries, which would hide errors."""

    def make(sidecar, **options):
        return openai.AsyncOpenAI(base_url=f"{sidecar.url}/v1", api_key="unused", max_retries=0, **options)

    return make


async def test_the_body_reaches_the_upstream_byte_for_byte(serving, scripted):
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", dashscope_api_key="sk-provider")
    body = b'{ "messages" :[{"role":"user","content":"hi"}],\n "model":"m", "new_field": [1.0, 1e3, "\\u00e9"] }  '
    async with sidecar.client.post(sidecar.url + CHAT, data=body) as response:
        assert response.status == 200
        assert await response.json() == CHAT_ANSWER
    assert upstream.seen[0].body == body
    assert upstream.seen[0].headers["authorization"] == "Bearer sk-provider"


@pytest.mark.parametrize("named", ["", '"model": null,'])
async def test_a_body_without_a_model_gets_the_default_and_nothing_else_changes(serving, scripted, named):
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", dashscope_model="qwen-vl-max")
    body = '{%s"messages":[{"role":"user","content":"hi"}],"temperature":1.50}' % named  # noqa: UP031
    async with sidecar.client.post(sidecar.url + CHAT, data=body) as response:
        assert response.status == 200
    sent = json.loads(upstream.seen[0].body)
    assert sent.pop("model") == "qwen-vl-max"
    assert sent == {"messages": [{"role": "user", "content": "hi"}], "temperature": 1.5}


async def test_only_the_listed_headers_are_forwarded(serving, scripted):
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", dashscope_api_key="sk-provider")
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    headers = {
        "X-DashScope-DataInspection": "{}", "X-Request-Id": "r-1", "traceparent": trace,
        "Authorization": "Bearer caller", "Cookie": "a=b", "X-Camera-Id": "gate", "Connection": "keep-alive",
    }  # fmt: skip
    async with sidecar.post(headers=headers) as response:
        assert response.headers["X-Request-Id"] == "r-1"
        assert response.headers["traceparent"] == trace
        assert response.headers["X-Sidecar-Backend"] == "dashscope"
        assert response.headers["X-Sidecar-Attempts"] == "1"
    sent = upstream.seen[0].headers
    assert sent["x-dashscope-datainspection"] == "{}"
    assert (sent["x-request-id"], sent["traceparent"]) == ("r-1", trace)
    assert sent["authorization"] == "Bearer sk-provider"
    assert not {"cookie", "x-camera-id", "connection"} & sent.keys()


async def test_the_answer_has_the_callers_request_id_and_not_the_providers(serving, scripted):
    async def script(link: Link, _: Seen) -> None:
        await link.answer(CHAT_ANSWER, headers="x-request-id: of-the-provider\r\nTraceparent: t\r\n")

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    async with sidecar.post(headers={"X-Request-Id": "r-1"}) as response:
        assert response.headers.getall("X-Request-Id") == ["r-1"]


async def test_compatible_mode_paths_and_models_are_answered(serving, provider):
    url, _ = await provider()
    sidecar = await serving(dashscope_url=url)
    async with sidecar.post(path="/compatible-mode/v1/chat/completions") as response:
        assert response.status == 200
    for base in ("/v1", "/compatible-mode/v1"):
        async with sidecar.client.get(f"{sidecar.url}{base}/models") as response:
            assert "qwen-vl-plus" in {model["id"] for model in (await response.json())["data"]}


async def test_the_openai_client_gets_whole_and_streamed_answers(serving, provider, client_of):
    url, _ = await provider(answer_tokens=30)
    client = client_of(await serving(dashscope_url=url))
    whole = await client.chat.completions.create(**chat())
    assert whole.choices[0].message.content
    assert whole.usage.completion_tokens == 30
    pieces, usage = [], None
    stream = await client.chat.completions.create(**chat(), stream=True, stream_options={"include_usage": True})
    async for chunk in stream:
        pieces += [choice.delta.content or "" for choice in chunk.choices]
        usage = chunk.usage or usage
    assert len("".join(pieces)) > 80  # 30 LLM tokens
    assert usage.completion_tokens == 30
    assert {model.id async for model in client.models.list()} >= {"qwen-vl-plus"}


async def test_the_openai_client_raises_its_own_exceptions_for_our_errors(serving, provider, client_of):
    url, simulated = await provider(latency_seconds=0.5)
    sidecar = await serving(dashscope_url=url, api_key="letmein")
    client = client_of(sidecar)
    with pytest.raises(openai.AuthenticationError) as refused:
        await client.chat.completions.create(**chat())
    assert refused.value.code == "unauthorized"
    client = client.with_options(api_key="letmein")
    with pytest.raises(openai.BadRequestError) as invalid:
        await client.chat.completions.create(**chat(messages=[]))
    assert (invalid.value.code, invalid.value.param) == ("invalid_request", "messages")
    with pytest.raises(openai.InternalServerError) as late:
        await client.chat.completions.create(**chat(), extra_headers={"X-Request-Timeout": "0.2"})
    assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")
    simulated.change(simulated.profile.__class__(billing_refused=True))
    with pytest.raises(openai.InternalServerError) as billing:
        await client.chat.completions.create(**chat())
    assert (billing.value.status_code, billing.value.code) == (502, "upstream_billing")


@pytest.mark.alone
async def test_a_caller_that_leaves_a_stream_cancels_the_upstream_within_100_ms(serving, provider, client_of):
    url, simulated = await provider(answer_tokens=400, stream_tokens_per_second=100)
    sidecar = await serving(dashscope_url=url)
    client = client_of(sidecar)
    stream = await client.chat.completions.create(**chat(), stream=True)
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    loop = asyncio.get_running_loop()
    begun = loop.time()
    await stream.close()
    await sidecar.until(lambda: simulated.counts.disconnects == 1)
    assert loop.time() - begun < 0.1
    await sidecar.until(sidecar.at_rest)
    assert (await sidecar.metrics())[
        'sidecar_requests_total{api="openai",backend="dashscope",outcome="cancelled"}'
    ] == 1


async def test_a_caller_that_disconnects_before_the_answer_cancels_the_upstream(serving, provider):
    url, simulated = await provider(latency_seconds=30)
    sidecar = await serving(dashscope_url=url)
    task = asyncio.ensure_future(sidecar.post().__aenter__())
    await sidecar.until(lambda: simulated.counts.in_flight == 1)
    task.cancel()
    await sidecar.until(lambda: simulated.counts.disconnects == 1)
    await sidecar.until(sidecar.at_rest)


async def test_the_providers_own_error_reaches_the_caller_unchanged(serving, scripted):
    error = {"error": {"message": "no such model", "type": "invalid_request_error", "code": "model_not_found"}}
    upstream = await scripted(lambda link, _: link.answer(error, status=404))
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    async with sidecar.post() as response:
        assert response.status == 404
        assert await response.json() == error
    assert len(upstream.seen) == 1

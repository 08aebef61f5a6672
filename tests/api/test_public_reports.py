"""Faults that users of similar programs reported in public, as the sidecar meets them.

Each row names the thread it comes from. The inputs are our own: they have the shape that the thread describes, and
other words. `make clients` is the other half: the same programs' clients in front of the sidecar.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import time

import pytest
from running import Process, chat, free_port
from scripted_upstream import CHAT_ANSWER
from unusual_answers import BUSY, check_refusal, error, event, first_then

pytestmark = pytest.mark.http


PLAN = "You exceeded your current quota, please check your plan and billing details (see error-code#token-limit)."
NO_ROOM = {"reason": "MODEL_CAPACITY_EXHAUSTED", "@type": "type.googleapis.com/google.rpc.ErrorInfo"}
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'

#: Thread; status; body; kind of the refusal, if it is one; the caller's status and code; requests at the provider.
REFUSALS = [
    # DashScope's limit of tokens in OpenAI's words about money
    ("oh-my-pi PR#8476", 429, error(PLAN, code="Throttling.AllocationQuota", type="insufficient_quota"),
     "token_rate", 200, None, 2),
    ("synthadoc #215", 403, error("The free quota is exhausted.", code="AllocationQuota.FreeTierOnly"),
     "billing", 200, None, 2),
    ("hermes-agent PR#90503", 429, error("The weekly allowance is used up, it returns on 2099-01-04.", code="1310"),
     "quota_period", 503, "upstream_quota_used_up", 1),
    ("hermes-agent PR#106427", 429, error("This key has reached its last limit.", code="terminal_quota_exhausted"),
     "billing", 200, None, 2),
    ("image-router #33", 429, {"detail": "Quota exceeded and account balance is $0.0, please pay"},
     "billing", 200, None, 2),
    ("opencode PR#13018 (Bedrock)", 429, {"message": "Too many tokens per day, wait before you try again."},
     "quota_period", 503, "upstream_quota_used_up", 1),
    ("opencode PR#13018 (Cerebras)", 429, {"message": "Too many tokens processed.", "type": "too_many_tokens_error"},
     "token_rate", 200, None, 2),
    ("opencode PR#13018 (Anthropic)", 400, error("prompt is too long: 285744 tokens > 200000 maximum",
     type="invalid_request_error"), None, 400, None, 1),
    ("goose PR#9831", 400, error("max_tokens must be at most 4096", type="invalid_request_error", code="bad_param"),
     None, 400, "bad_param", 1),
    ("llama-swap #146", 503, error("Loading model", code=503, type="unavailable_error"), "capacity", 200, None, 2),
    ("9router #1106", 429, error("There is no capacity for the model", code=429, details=[NO_ROOM]),
     "capacity", 200, None, 2),
    ("cline #440", 503, b"503 server is overloaded.", "capacity", 200, None, 2),
    ("litellm #27823", 429, error("No deployments available for the model, Try again in 1 seconds.", code="429"),
     "capacity", 200, None, 2),
    ("CLIProxyAPI #5681", 520, b"<html><title>Web server is returning an unknown error</title>", None, 200, None, 2),
    # a 200 that holds no answer: it was charged, so it is not asked for again
    ("litellm #32221", 200, b"null", None, 502, "upstream_error", 1),
    # a refusal inside a 200
    ("new-api #7399", 200, {"error": BUSY}, "capacity", 200, None, 2),
]  # fmt: skip
#: The same in a stream that begins with 200.
REFUSED_STREAMS = [
    ("hermes-agent PR#61123", event({"type": "error", "error": {"message": "rate limit exceeded"}}),
     "unknown", 200, None, 2),
    ("claude-code-hub PR#649", event({"error": {"code": "1302", "message": "no"}})[:-1] + b"data: [DONE]\n\n",
     "concurrency", 200, None, 2),
    ("new-api #7399 (stream)", b"data: " + json.dumps({"type": "error", "error": BUSY}).encode() + b"\n\n",
     "capacity", 200, None, 2),
    # the request's own fault: its status, and not a 200 with an error in it
    ("clawrouter #101", event({"error": {"message": "invalid request", "type": "invalid_request", "code": 400}}),
     None, 400, 400, 1),
    # nothing to read: an error, and not an empty answer; it was charged, so it is not asked for again
    ("new-api #2989", ROLE + b"data: [DONE]\n\n", None, 502, "upstream_error", 1),
]  # fmt: skip


@pytest.mark.parametrize("row", REFUSALS, ids=[row[0] for row in REFUSALS])
async def test_a_refusal_is_read_for_what_it_is(serving, scripted, row):
    _, status, body, *expected = row
    script, times = first_then((status, body, ""))
    await check_refusal(serving, await scripted(script), times, expected)


@pytest.mark.parametrize("row", REFUSED_STREAMS, ids=[row[0] for row in REFUSED_STREAMS])
async def test_a_refusal_in_a_stream_is_read_for_what_it_is(serving, scripted, row):
    _, body, *expected = row
    script, times = first_then((200, body, ""), stream=True)
    await check_refusal(serving, await scripted(script), times, expected, stream=True)


#: Thread; header, to which "DATE" is a date in two seconds; seconds until the next call, at least and at most.
WAITS = [
    ("urllib3 #2861", "Retry-After: 0.7", 0.65, 2.0),
    ("hermes-agent #84738", "Retry-After: DATE", 0.9, 3.0),
    ("crawlee-python PR#1995", "Retry-After: -5", 0.3, 2.0),
    ("JobCtrl PR#231", "Retry-After: NaN", 0.3, 2.0),
    ("litellm PR#5358", "retry-after-ms: 1200", 1.1, 3.0),
]


@pytest.mark.parametrize("row", WAITS, ids=[row[0] for row in WAITS])
async def test_every_form_of_retry_after_is_read_and_an_invalid_one_is_no_wait(serving, scripted, row):
    _, header, least, most = row
    header = header.replace("DATE", email.utils.formatdate(time.time() + 2, usegmt=True))
    script, times = first_then((503, error("busy"), f"{header}\r\n"))
    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", deadline=10)
    async with sidecar.post() as response:
        assert response.status == 200
    assert least <= times[1] - times[0] < most


async def test_each_retry_obeys_the_newest_retry_after(serving, scripted):
    """litellm #20722: all retries waited for the time of the first refusal."""
    times = []

    async def script(link, _):
        times.append(time.monotonic())
        if len(times) < 3:
            await link.answer(error("busy"), status=503, headers=f"Retry-After: {len(times)}\r\n")
        else:
            await link.answer(CHAT_ANSWER)

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    async with sidecar.post() as response:
        assert response.status == 200
    assert times[2] - times[1] > 1.9 > times[1] - times[0] > 0.9


async def talk(sidecar, head: str, *bodies: bytes) -> bytes:
    """Send a head and then each body after an answer has come. Return the last answer, up to 64 kB."""
    reader, writer = await asyncio.open_connection("127.0.0.1", sidecar.sidecar.data_port)
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: a", "Content-Type: application/json", head]
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n")
    try:
        async with asyncio.timeout(10):
            for body in bodies[:-1]:
                writer.write(body)
                assert (await reader.read(65536)).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
            writer.write(bodies[-1])
            return await reader.read(65536)
    finally:
        writer.close()


async def test_expect_100_continue_is_answered_before_the_body(serving, scripted):
    """spring-cloud-gateway #730: curl sends it for a body of some size and then waits."""
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    body = json.dumps(chat()).encode()
    answer = await talk(sidecar, f"Expect: 100-continue\r\nContent-Length: {len(body)}", b"", body)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert "expect" not in upstream.seen[0].headers


async def test_a_chunked_request_goes_on_with_its_length(serving, scripted):
    """llama-swap #11: the server behind it did not read chunks."""
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    body = json.dumps(chat()).encode()
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:50], body[50:])) + b"0\r\n\r\n"
    assert (await talk(sidecar, "Transfer-Encoding: chunked", chunks)).startswith(b"HTTP/1.1 200 OK\r\n")
    assert upstream.seen[0].body == body
    assert "transfer-encoding" not in upstream.seen[0].headers


async def test_an_answer_never_has_both_a_length_and_chunks(serving, scripted):
    """powerproxy-aoai #53: an upstream's answer with both is an attack or a fault, and never goes on."""
    body = json.dumps(CHAT_ANSWER).encode()

    async def script(link, _):
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 5\r\nTransfer-Encoding: chunked"
        await link.send(b"%b\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (head, len(body), body))

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    async with sidecar.post() as response:
        assert (response.status, (await response.json())["error"]["code"]) == (502, "upstream_error")
        assert "Transfer-Encoding" not in response.headers


async def test_a_head_request_has_the_length_of_the_answer_to_get(serving, scripted):
    """http-proxy-middleware #1121."""

    async def script(link, _):
        await link.answer({"object": "list", "data": []})

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    for method in ("GET", "HEAD"):
        async with sidecar.client.request(method, f"{sidecar.url}/v1/models") as response:
            assert (response.status, response.headers["Content-Length"]) == (200, "30")


async def test_a_stream_whose_provider_cannot_be_reached_is_no_200(serving):
    """headroom PR#3083."""
    sidecar = await serving(dashscope_url=f"http://127.0.0.1:{free_port()}/v1", deadline=3)
    async with sidecar.post(chat(stream=True)) as response:
        assert (response.status, response.content_type) == (502, "application/json")


async def test_a_deadline_that_passes_in_the_queue_is_an_error_and_no_short_answer(serving, scripted):
    """atlas #482: the caller got one token and `finish_reason: length`."""

    async def script(link, _):
        await asyncio.sleep(2)
        await link.answer(CHAT_ANSWER)

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", max_concurrency=1)

    async def ask(seconds):
        async with sidecar.post(headers={"X-Request-Timeout": seconds}) as response:
            return response.status, (await response.json()).get("error", {}).get("code")

    first, second = await asyncio.gather(ask("20"), ask("1"))
    assert first == (200, None)
    assert second in ((503, "deadline_unreachable"), (504, "deadline_exceeded"))
    assert len(upstream.seen) == 1


async def test_no_proxy_excludes_the_provider_from_every_proxy(scripted):
    """hermes-agent #14451, langfuse PR#15467, n8n #16171."""
    upstream = await scripted()
    dead = f"http://127.0.0.1:{free_port()}"
    environ = {"http_proxy": dead, "HTTP_PROXY": dead, "ALL_PROXY": dead, "no_proxy": "localhost, 127.0.0.1"}
    async with Process("--dashscope-url", f"{upstream.origin}/v1", environ={**environ, "NO_PROXY": ""}) as sidecar:
        status, _ = await asyncio.to_thread(post, f"{sidecar.url}/v1/chat/completions")
    assert (status, len(upstream.seen)) == (200, 1)


def post(url: str) -> tuple[int, bytes]:
    import urllib.request  # noqa: PLC0415

    request = urllib.request.Request(url, json.dumps(chat()).encode(), {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as answer:
        return answer.status, answer.read()


#: base64 of 1.8 MB: 450,000 LLM tokens if it counted as text.
LARGE = "QUJD" * 600_000
PICTURES = [
    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{LARGE}"}},
    {"type": "input_image", "image_url": f"data:image/png;base64,{LARGE}"},
    {"type": "image", "image": LARGE},
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": LARGE}},
    {"inlineData": {"mimeType": "image/png", "data": LARGE}},
    {"inline_data": {"mime_type": "image/png", "data": LARGE}},
]


@pytest.mark.parametrize("picture", PICTURES, ids="-".join)
async def test_a_picture_counts_as_a_picture_however_it_is_written(serving, scripted, picture):
    """OmniRoute #8368, github-copilot-llm-gateway #104, dify PR#5868: it counted as text, and was refused."""
    upstream = await scripted()
    sidecar = await serving(
        dashscope_url=f"{upstream.origin}/v1", passthrough=True, tokens_per_minute=60_000, deadline=3
    )
    body = {"model": "m", "input": [{"role": "user", "content": [picture]}]}
    async with sidecar.post(body, path="/v1/responses") as response:
        assert response.status == 200
    messages = [{"role": "user", "content": [picture]}]
    if "image_url" not in picture:  # the chat API reads the picture there, and this is none
        async with sidecar.post({"model": "m", "messages": messages}) as response:
            assert response.status == 200

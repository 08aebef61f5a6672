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

pytestmark = pytest.mark.http

GENERATION = "/api/v1/services/aigc/multimodal-generation/generation"
STREAMED = b'data: {"choices":[{"index":0,"delta":{"content":"A gate."},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'


async def send_stream(link, raw: bytes, size: int = 65536) -> None:
    await link.start_stream()
    for start in range(0, len(raw), size):
        await link.chunk(raw[start : start + size])
    await link.chunk(b"")


def first_then(first, *, stream=False, good=None):
    """Answer the first request with `first` (status, body, headers), and all later ones well. Count the requests."""
    times: list[float] = []

    async def script(link, _):
        times.append(time.monotonic())
        status, body, headers = first if len(times) == 1 else (200, good, "")
        if body is None:
            body = STREAMED if stream else CHAT_ANSWER
        if isinstance(body, bytes) and body.startswith((b"data", b"event")):
            await send_stream(link, body)
        else:
            await link.answer(body, status=status, headers=headers)

    return script, times


async def kinds_of(sidecar) -> list[str]:
    await sidecar.until(sidecar.at_rest)
    return [
        name.split('kind="')[1].rstrip('"}')
        for name in await sidecar.metrics()
        if name.startswith("sidecar_throttles_total")
    ]


async def outcomes_of(sidecar) -> list[str]:
    await sidecar.until(sidecar.at_rest)
    return [
        name.split('outcome="')[1].rstrip('"}')
        for name, value in (await sidecar.metrics()).items()
        if name.startswith("sidecar_requests_total") and value
    ]


def error(message: str, **more) -> dict:
    return {"error": {"message": message, **more}}


def event(data: dict, name: bytes = b"error") -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name, json.dumps(data).encode())


PLAN = "You exceeded your current quota, please check your plan and billing details (see error-code#token-limit)."
NO_ROOM = {"reason": "MODEL_CAPACITY_EXHAUSTED", "@type": "type.googleapis.com/google.rpc.ErrorInfo"}
BUSY = {"code": "server_is_overloaded", "message": "Our servers are overloaded at the moment. Try it again later."}
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'

#: Thread; status; body; kind of the refusal, if it is one; the caller's status and code; requests at the provider.
REFUSALS = [
    # DashScope's limit of tokens in OpenAI's words about money
    ("oh-my-pi PR#8476", 429, error(PLAN, code="Throttling.AllocationQuota", type="insufficient_quota"),
     "token_rate", 200, None, 2),
    ("synthadoc #215", 403, error("The free quota is exhausted.", code="AllocationQuota.FreeTierOnly"),
     "billing", 502, "upstream_billing", 1),
    ("hermes-agent PR#90503", 429, error("The weekly allowance is used up, it returns on 2099-01-04.", code="1310"),
     "quota_period", 503, "upstream_quota_used_up", 1),
    ("hermes-agent PR#106427", 429, error("This key has reached its last limit.", code="terminal_quota_exhausted"),
     "billing", 502, "upstream_billing", 1),
    ("image-router #33", 429, {"detail": "Quota exceeded and account balance is $0.0, please pay"},
     "billing", 502, "upstream_billing", 1),
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


async def check_refusal(serving, upstream, times, expected, **more):
    kind, answered, code, calls = expected
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", deadline=10)
    async with sidecar.post(chat(**more)) as response:
        raw = await response.read()
    assert (response.status, len(times)) == (answered, calls), raw
    if code is not None:
        assert json.loads(raw)["error"]["code"] == code
    assert await kinds_of(sidecar) == ([kind] if kind else [])


# -- streams: the caller gets the bytes unchanged, a native caller the same text and the same tool calls --------------


def piece(delta: dict, finish: str | None = None, **more) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return json.dumps({"choices": [choice], **more}, ensure_ascii=False)


def said(*texts: str) -> list[str]:
    return [piece({"content": text}) for text in texts]


def called(*calls: dict) -> bytes:
    return lines(*(piece({"tool_calls": [call]}) for call in calls), piece({}, "tool_calls"), "[DONE]")


def lines(*data: str, end: str = "\n\n") -> bytes:
    return "".join(f"data: {one}{end}" for one in data).encode()


def call(arguments: str, **more) -> dict:
    name = {"name": "look"} if more.pop("named", False) else {}
    return {"function": {**name, "arguments": arguments}, **more}


STOP = piece({}, "stop")
EIN_TOR = said("Ein ", "Tor 门🚪")
ONE_CALL, TWO_CALLS = ['{"at": 1}'], ['{"at": 1}', '{"at": 2}']
FULL = {"prompt_tokens": 287, "completion_tokens": 8, "total_tokens": 295}
#: Thread; stream; bytes of one piece; arguments of the tool calls, or None for the text of `EIN_TOR`.
STREAMS = [
    ("openai-python #498", lines(*EIN_TOR, STOP, "[DONE]").replace(b"data: ", b"data:"), 65536, None),
    ("openai-node #2725 (one line end)", lines(*EIN_TOR) + f"data: {STOP}\n".encode(), 65536, None),
    ("openai-node #2725 (none)", lines(*EIN_TOR) + f"data: {STOP}".encode(), 65536, None),
    ("openai-node PR#2309", lines(*EIN_TOR, end="\n\r\n") + lines(STOP, end="\r\n\n") + b"data: [DONE]\r\r", 1, None),
    ("headroom PR#649", lines(*EIN_TOR, STOP, "[DONE]", end="\r\n\r\n"), 3, None),
    ("a2a-js #714", lines(*EIN_TOR, STOP, "[DONE]", end="\r\r"), 3, None),
    ("aisix #111", lines(*EIN_TOR, STOP, "[DONE]"), 1, None),
    ("a BOM in pieces (found with `make clients`)", b"\xef\xbb\xbf" + lines(*EIN_TOR, STOP, "[DONE]"), 1, None),
    ("inference-perf PR#781", lines(*EIN_TOR, STOP) + b"data:[DONE] \n\n", 65536, None),
    ("opencode #27365", lines(*EIN_TOR, end="\n") + lines(STOP, "[DONE]", end="\n"), 65536, None),
    ("pi #8430", lines(*EIN_TOR, STOP, "[DONE]").replace(b"data", b"event: message\n\ndata"), 65536, None),
    ("eino-ext #925", lines(*EIN_TOR, STOP, "[DONE]").replace(b', "delta"', b',\ndata: "delta"'), 7, None),
    ("opencode #50871", lines(": keepalive", EIN_TOR[0], ": keepalive", EIN_TOR[1], STOP, "[DONE]"), 65536, None),
    ("llmgateway PR#2334", lines(*EIN_TOR, STOP, "[DONE]").replace(b"data", b": ping\n\nid: 7\ndata"), 65536, None),
    ("opencrabs PR#1499", lines(piece({"role": "assistant"}, ""), *EIN_TOR, STOP).replace(b"null", b'""'), 65536, None),
    ("OmniRoute #9750", lines(*EIN_TOR, STOP, piece({}, usage=FULL), "[DONE]"), 65536, None),
    ("Containarium PR#788", lines(piece({"content": "Ein "}, usage={**FULL, "completion_tokens": 3}), EIN_TOR[1],
     piece({}, "stop", usage=FULL)), 65536, None),
    ("opencode PR#40969", called(call("", named=True, index=0, id="call_1"), call('{"at":', index=0, id=""),
     call(" 1}", index=0, id="")), 65536, ONE_CALL),
    ("AstrBot PR#6692", called(call("", named=True, id="call_1"), call('{"at":'), call(" 1}")), 65536, ONE_CALL),
    ("GPT_API_free #254", called(call("", named=True, index=None, id="call_1"), call('{"at": 1}', index=None),
     call('{"at": 2}', named=True, index=None, id="call_2")), 65536, TWO_CALLS),
    ("agno PR#8880", called(call('{"at": 1}', named=True, index=0, id="call_1"),
     call("", named=True, index=0, id="call_2"), call('{"at": 2}', index=1)), 65536, TWO_CALLS),
    ("continue #13225", called(call('{"at":', named=True, index=0), call(" 1}", index=0)), 65536, ONE_CALL),
    ("sglang #7048", called(call('{"at": 1}', named=True, index=0, id="call_1"),
     call('{"at": 2}', named=True, index=1, id=None)), 65536, TWO_CALLS),
]  # fmt: skip


@pytest.mark.parametrize("row", STREAMS, ids=[row[0] for row in STREAMS])
@pytest.mark.parametrize("incremental", [True, False])
async def test_an_unusual_stream_reaches_both_apis_whole(serving, scripted, row, incremental):
    _, raw, size, arguments = row
    upstream = await scripted(lambda link, _: send_stream(link, raw, size))
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    async with sidecar.post(chat(stream=True)) as response:
        assert await response.read() == raw
    messages = [{"role": "user", "content": [{"text": "hello"}]}]
    body = {"model": "m", "input": {"messages": messages}, "parameters": {"incremental_output": incremental}}
    async with sidecar.post(body, path=GENERATION, headers={"X-DashScope-SSE": "enable"}) as response:
        frames = [json.loads(line[5:]) for line in (await response.text()).split("\n") if line.startswith("data:")]
    choices = [frame["output"]["choices"][0] for frame in frames]
    assert choices[-1]["finish_reason"] == ("stop" if arguments is None else "tool_calls")
    said_by = [choice["message"] for choice in (choices if incremental else choices[-1:])]
    if arguments is None:
        assert "".join(part["text"] for message in said_by for part in message["content"]) == "Ein Tor 门🚪"
    else:
        joined: dict[int, str] = {}
        for one in [one for message in said_by for one in message.get("tool_calls", [])]:
            joined[one["index"]] = joined.get(one["index"], "") + one["function"]["arguments"]
        assert list(joined.values()) == arguments
    assert await outcomes_of(sidecar) == ["ok", "ok"]
    if b"usage" in raw:  # once for each request, also if each piece repeats it
        tokens = {name: value for name, value in (await sidecar.metrics()).items() if "sidecar_tokens_total" in name}
        assert sorted(tokens.values()) == [8, 8, 287, 287]


async def test_an_empty_finish_reason_ends_no_stream(serving, scripted):
    """opencrabs PR#1499: if nothing else comes, the stream was cut."""
    raw = lines(piece({"role": "assistant"}, ""), *EIN_TOR).replace(b"null", b'""')
    upstream = await scripted(lambda link, _: send_stream(link, raw))
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    async with sidecar.post(chat(stream=True)) as response:
        assert (await response.read()).count(b'"code":"upstream_error"') == 1
    assert await outcomes_of(sidecar) == ["error"]


async def test_a_comment_packed_into_data_is_no_content_so_a_refusal_behind_it_is_sent_again(serving, scripted):
    """opencode #50871."""
    script, times = first_then((200, b"data: : keepalive\n\n" + event({"error": BUSY}), ""), stream=True)
    await check_refusal(serving, await scripted(script), times, ("capacity", 200, None, 2), stream=True)


# -- the Responses API, which passes through ---------------------------------------------------------------------------


def response(status: str, **more) -> dict:
    return {"id": "resp-1", "object": "response", "status": status, "error": None, "output": [], "usage": None, **more}


def responded(kind: str, **more) -> bytes:
    return event({"type": f"response.{kind}", **more}, f"response.{kind}".encode())


BEGUN = responded("created", response=response("queued")) + responded("in_progress", response=response("in_progress"))
SOME = responded("output_text.delta", delta="A gate.")
COUNTED = response("completed", usage={"input_tokens": 11, "output_tokens": 5, "total_tokens": 16})
GOOD = BEGUN + SOME + responded("completed", response=COUNTED)
FAILED = responded("failed", response=response("failed", error=BUSY))
TOO_LONG = {"code": "context_length_exceeded", "message": "The input is longer than the context window."}
#: Thread; first answer; kind of the refusal; the caller's status; requests at the provider; outcome.
RESPONSES = [
    ("routatic/proxy PR#165", GOOD, None, 200, 1, "ok"),
    ("new-api #3142", BEGUN + FAILED, "capacity", 200, 2, "ok"),
    ("codex-proxy-rs PR#90", BEGUN + event({"type": "error", **BUSY}), "capacity", 200, 2, "ok"),
    ("codex2api PR#318", BEGUN + responded("failed", response=response("failed", error=TOO_LONG)), None, 413, 1,
     "rejected_upstream"),
    ("new-api #3142 (late)", BEGUN + SOME + FAILED, "capacity", 200, 1, "error"),
    ("new-api #5221", BEGUN + SOME, None, 200, 1, "error"),
    ("new-api #5221 (nothing but a beginning)", BEGUN, None, 200, 2, "ok"),
    ("new-api #5221 (incomplete)", BEGUN + SOME + responded("incomplete", response=COUNTED), None, 200, 1, "ok"),
    ("forgecode PR#3460 (whole)", response("failed", error=BUSY), "capacity", 200, 2, "ok"),
    ("a request in the background", response("queued"), None, 200, 1, "ok"),
]  # fmt: skip


@pytest.mark.parametrize("row", RESPONSES, ids=[row[0] for row in RESPONSES])
async def test_the_responses_api_fails_inside_a_200_too(serving, scripted, row):
    _, first, kind, answered, calls, outcome = row
    stream = isinstance(first, bytes)
    script, times = first_then((200, first, ""), good=GOOD if stream else COUNTED)
    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", passthrough=True, deadline=10)
    body = {"model": "m", "input": "hello", "stream": stream}
    async with sidecar.post(body, path="/v1/responses") as answer:
        raw = await answer.read()
    assert (answer.status, len(times), await outcomes_of(sidecar)) == (answered, calls, [outcome]), raw
    assert await kinds_of(sidecar) == ([kind] if kind else [])
    if outcome == "ok" and first != response("queued"):
        tokens = {name: value for name, value in (await sidecar.metrics()).items() if "sidecar_tokens_total" in name}
        assert sorted(tokens.values()) == [5, 11]


# -- waits, HTTP, proxies ----------------------------------------------------------------------------------------------


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

"""Unusual streams that users of similar programs reported in public, as the sidecar meets them.

Each row names the thread it comes from, as in test_public_reports.py.
The caller of OpenAI's API gets the bytes unchanged, and a native caller the same text and the same tool calls.
"""

from __future__ import annotations

import json

import pytest
from running import chat
from unusual_answers import BUSY, check_refusal, event, first_then, kinds_of, outcomes_of, send_stream, tokens_of

pytestmark = pytest.mark.http

GENERATION = "/api/v1/services/aigc/multimodal-generation/generation"


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
        assert await tokens_of(sidecar) == [8, 8, 287, 287]


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
        assert await tokens_of(sidecar) == [5, 11]

"""DashScope's own API over real sockets: forwarded, translated, streamed, and errors inside a stream."""

from __future__ import annotations

import base64
import json

import pytest
from running import IMAGE_URL

from sidecar.cli.demo.frames import frame

GENERATION = "/api/v1/services/aigc/multimodal-generation/generation"
SSE = {"X-DashScope-SSE": "enable"}


def question(**fields):
    content = [{"image": IMAGE_URL}, {"text": "What is going on?"}]
    return {"model": "qwen-vl-plus", "input": {"messages": [{"role": "user", "content": content}]}, **fields}


def events(text: str) -> list[tuple[str, int, dict]]:
    """Return name, status and data of each event."""
    found = []
    for event in text.split("\n\n"):
        lines = event.split("\n")
        if event.strip():
            name = next(line[6:] for line in lines if line.startswith("event:"))
            status = next(int(line.rpartition("/")[2]) for line in lines if line.startswith(":HTTP_STATUS/"))
            found.append((name, status, json.loads(next(line[5:] for line in lines if line.startswith("data:")))))
    return found


async def ask(sidecar, body=None, **options):
    async with sidecar.post(question() if body is None else body, path=GENERATION, **options) as response:
        return response, await response.text()


async def test_the_body_and_the_headers_reach_dashscopes_own_api_unchanged(serving, scripted):
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/compatible-mode/v1", dashscope_api_key="sk-provider")
    body = b'{"model":"m", "input":{"messages":[{"role":"user","content":[{"text":"hi"}]}]},"new": 1.50}'
    headers = {"X-DashScope-DataInspection": "{}", "X-DashScope-WorkSpace": "w", "Authorization": "Bearer caller"}
    async with sidecar.client.post(sidecar.url + GENERATION, data=body, headers=headers) as response:
        assert response.status == 200
    (seen,) = upstream.seen
    assert (seen.path, seen.body) == (GENERATION, body)
    assert seen.headers["authorization"] == "Bearer sk-provider"
    assert (seen.headers["x-dashscope-datainspection"], seen.headers["x-dashscope-workspace"]) == ("{}", "w")


@pytest.mark.parametrize("backend", ["dashscope", "translated", "simulated"])
async def test_whole_and_streamed_answers_of_every_backend(serving, provider, backend):
    url, _ = await provider(answer_tokens=30)
    if backend == "translated":
        url = url.replace("/compatible-mode", "")  # this URL does not show that the provider also has a native API
    sidecar = await serving(**({"backend": "simulated"} if backend == "simulated" else {"dashscope_url": url}))
    response, text = await ask(sidecar)
    answer = json.loads(text)
    text_of_answer = answer["output"]["choices"][0]["message"]["content"][0]["text"]
    assert text_of_answer
    assert answer["usage"]["output_tokens"] > 0
    assert "total;dur" in response.headers["Server-Timing"]

    for incremental in (False, True):
        parameters = {"incremental_output": incremental, "result_format": "message"}
        response, text = await ask(sidecar, question(parameters=parameters), headers=SSE)
        assert response.headers["Content-Type"].startswith("text/event-stream")
        frames = events(text)
        assert len(frames) > 2
        assert {(name, status) for name, status, _ in frames} == {("result", 200)}
        pieces = [data["output"]["choices"][0]["message"]["content"] for _, _, data in frames]
        texts = [piece[0]["text"] if piece else "" for piece in pieces]
        whole = "".join(texts) if incremental else texts[-1]
        assert len(whole) > 20
        assert frames[-1][2]["output"]["choices"][0]["finish_reason"] == "stop"


async def test_after_a_refusal_before_a_streams_first_content_the_request_waits_and_succeeds(serving, provider):
    url, simulated = await provider(requests_per_second=5, burst_requests=1, in_stream_errors=True)
    sidecar = await serving(dashscope_url=url)
    for _ in range(3):
        _, text = await ask(sidecar, headers=SSE)
        assert {name for name, _, _ in events(text)} == {"result"}
    assert simulated.counts.refused["request_rate"] > 0


async def test_an_error_after_a_streams_first_content_reaches_the_caller_once(serving, scripted):
    good = {"output": {"choices": [{"finish_reason": "null", "message": {"content": [{"text": "A"}]}}]}, "usage": {}}
    bad = {"code": "InternalError", "message": "broken", "request_id": "r"}

    async def script(link, seen):
        await link.start_stream()
        await link.chunk(b"id:1\nevent:result\n:HTTP_STATUS/200\ndata:" + json.dumps(good).encode() + b"\n\n")
        await link.chunk(b"id:2\nevent:error\n:HTTP_STATUS/500\ndata:" + json.dumps(bad).encode() + b"\n\n")
        await link.chunk(b"")

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/compatible-mode/v1")
    _, text = await ask(sidecar, headers=SSE)
    assert [(name, status) for name, status, _ in events(text)] == [("result", 200), ("error", 500)]
    assert events(text)[1][2] == bad
    metrics = await sidecar.metrics()
    assert metrics['sidecar_requests_total{api="native",backend="dashscope",outcome="error"}'] == 1


async def test_the_providers_own_refusal_reaches_the_caller_unchanged(serving, provider):
    url, _ = await provider(moderation_share=1.0)
    sidecar = await serving(dashscope_url=url)
    response, text = await ask(sidecar)
    assert response.status == 400
    assert json.loads(text)["code"] == "DataInspectionFailed"


async def test_the_sidecars_own_refusals_have_the_native_format_and_name_the_field(serving):
    sidecar = await serving(backend="simulated")
    for body, field in (
        ({"model": "m"}, "input.messages"),
        (question(model=5), "model"),
        ({"input": {"messages": [{"content": 5}]}}, "input.messages[0].content"),
        (question(parameters=[]), "parameters"),
    ):
        response, text = await ask(sidecar, body)
        answer = json.loads(text)
        assert (response.status, answer["code"], answer.keys()) == (
            400, "invalid_request", {"code", "message", "request_id"}
        ), body  # fmt: skip
        assert field in answer["message"]


async def test_a_missing_model_is_added_to_a_body_with_a_big_frame(serving, scripted):
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/compatible-mode/v1", dashscope_model="qwen-vl-max")
    url = "data:image/jpeg;base64," + base64.b64encode(frame(1)).decode()
    given = {"input": {"messages": [{"role": "user", "content": [{"image": url}]}]}}
    response, _ = await ask(sidecar, given)
    assert response.status == 200
    assert json.loads(upstream.seen[0].body) == {"model": "qwen-vl-max", **given}


async def test_an_error_in_a_stream_has_its_status_where_the_official_sdk_reads_it(serving, scripted):
    """The SDK reads the field `status`; it takes an error without it for a 400, the caller's own fault."""

    async def script(link, _):
        await link.start_stream()
        await link.chunk(b'data: {"choices":[{"delta":{"content":"A ga"}}]}\n\n')
        await link.chunk(b"")

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    _, text = await ask(sidecar, headers=SSE)
    last = text.rstrip().rpartition("\n\n")[2].split("\n")
    assert last[:3] == ["event:error", "status:502", ":HTTP_STATUS/502"]

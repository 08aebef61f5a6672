"""The provider over real sockets, on both event loops: its faults, and the control interface for tests."""

from __future__ import annotations

import asyncio

import aiohttp
import orjson
import pytest

from backends.simulated import PROVIDER, Profile, serve

BOUND = 10.0
CHAT = {"model": "m", "messages": [{"role": "user", "content": "What is going on?"}]}
NATIVE = {"model": "m", "input": {"messages": CHAT["messages"]}}
NATIVE_PATH = "/api/v1/services/aigc/multimodal-generation/generation"


class Served:
    def __init__(self, runner, client):
        self.counts = runner.app[PROVIDER].counts
        self.port = runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._client = client

    def post(self, path="/v1/chat/completions", json=CHAT, **options):
        return self._client.post(self.url + path, json=json, **options)

    def get(self, path, **options):
        return self._client.get(self.url + path, **options)

    async def until(self, condition) -> None:
        async with asyncio.timeout(BOUND):
            while not condition():  # noqa: ASYNC110  no event reports the condition
                await asyncio.sleep(0.005)


@pytest.fixture
async def served():
    runners = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(BOUND)) as client:

        async def start(*, api_key: str = "", **profile) -> Served:
            runners.append(await serve(Profile(**profile), api_key=api_key))
            return Served(runners[-1], client)

        yield start
        for runner in runners:
            await runner.cleanup()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/compatible-mode/v1/chat/completions"])
async def test_openai_requests_are_answered_below_both_base_paths(served, path):
    provider = await served()
    async with provider.post(path) as reply:
        assert (reply.status, reply.content_type) == (200, "application/json")
        assert (await reply.json())["object"] == "chat.completion"


async def test_native_requests_and_native_streams_are_answered(served):
    provider = await served()
    async with provider.post(NATIVE_PATH, NATIVE) as reply:
        assert (await reply.json())["output"]["choices"][0]["finish_reason"] == "stop"
    async with provider.post(NATIVE_PATH, NATIVE, headers={"X-DashScope-SSE": "enable"}) as reply:
        assert reply.content_type == "text/event-stream"
        assert (await reply.read()).startswith(b"id:1\nevent:result\n:HTTP_STATUS/200\ndata:")


async def test_a_disconnected_caller_ends_its_call_and_is_counted(served):
    provider = await served(latency_seconds=60)
    asked = asyncio.create_task(provider.post().__aenter__())
    await provider.until(lambda: provider.counts.in_flight == 1)
    asked.cancel()
    await provider.until(lambda: provider.counts.in_flight == 0)
    await provider.until(lambda: provider.counts.disconnects == 1)
    assert provider.counts.ended == {"cancelled": 1}


async def test_an_outage_without_a_status_breaks_the_connection(served):
    provider = await served(outages=((0, 99),))
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await provider.post().__aenter__()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_reset_sends_an_rst_in_the_middle_of_the_answer(served, stream):
    provider = await served(reset_share=1)
    body = orjson.dumps({**CHAT, "stream": stream})
    reader, writer = await asyncio.open_connection("127.0.0.1", provider.port)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    async with asyncio.timeout(BOUND):
        with pytest.raises(ConnectionResetError):  # a FIN would end the loop
            while await reader.read(65536):
                pass
    writer.close()
    assert provider.counts.ended == {"reset": 1}


async def test_the_statistics_count_all_calls(served):
    provider = await served(requests_per_second=0.001, burst_requests=2)
    for _ in range(5):
        async with provider.post() as reply:
            await reply.read()
    async with provider.get("/_simulate/stats") as reply:
        stats = await reply.json()
    assert stats == {
        "calls": 5, "accepted": 2, "refused": {"request_rate": 3}, "ended": {"answered": 2},
        "in_flight": 0, "max_in_flight": 1, "disconnects": 0,
    }  # fmt: skip


async def test_a_profile_can_be_changed_over_http_field_by_field(served):
    provider = await served(requests_per_second=0.001, answer_tokens=9)
    async with provider.post() as reply:
        assert reply.status == 200
    async with provider.post() as reply:
        assert reply.status == 429
    async with provider.post("/_simulate/profile", {"requests_per_second": None}) as reply:
        assert (await reply.json())["answer_tokens"] == 9
    async with provider.post() as reply:
        assert (await reply.json())["usage"]["completion_tokens"] == 9


@pytest.mark.parametrize("values", [[], {"speed": 1}, {"error_share": 2}, {"outages": 3}])
async def test_an_invalid_profile_is_refused_and_changes_nothing(served, values):
    provider = await served()
    async with provider.post("/_simulate/profile", values) as reply:
        assert reply.status == 400
        assert (await reply.json())["error"]
    async with provider.post() as reply:
        assert reply.status == 200


async def test_a_wrong_key_is_refused_in_the_format_of_the_api(served):
    provider = await served(api_key="sk-1")
    async with provider.post(headers={"Authorization": "Bearer sk-2"}) as reply:
        assert (reply.status, (await reply.json())["error"]["code"]) == (401, "invalid_api_key")
    async with provider.post(NATIVE_PATH, NATIVE) as reply:
        assert (reply.status, (await reply.json())["code"]) == (401, "InvalidApiKey")
    async with provider.get("/v1/models") as reply:
        assert reply.status == 401
    async with provider.get("/v1/models", headers={"Authorization": "Bearer sk-1"}) as reply:
        assert "qwen-vl-plus" in [model["id"] for model in (await reply.json())["data"]]
    assert provider.counts.calls == 0


async def test_a_stream_is_sent_at_the_pace_of_its_tokens(served):
    provider = await served(stream_tokens_per_second=200, answer_tokens=40)
    loop, times = asyncio.get_running_loop(), []
    async with provider.post(json={**CHAT, "stream": True}) as reply:
        async for line in reply.content:
            if line.startswith(b"data: {") and orjson.loads(line[6:])["choices"]:
                times.append(loop.time())  # noqa: PERF401  the loop is the measurement
    assert times[-1] - times[0] >= 0.15  # 40 LLM tokens at 200/s, less the first piece

"""DashScope's upload policy: what the official SDK asks for when a message names a local file (`file://…`)."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from pathlib import Path

import pytest
from real_parts import real_environment
from running import BOUND, PNG
from yarl import URL

from sidecar.api import uploads

UPLOAD = Path(__file__).parent / "dashscope_sdk_upload.py"
POLICY_PATH = "/api/v1/uploads"
QUERY = "action=getPolicy&model=qwen-vl-plus"
GENERATION = "/api/v1/services/aigc/multimodal-generation/generation"
ANSWER = {
    "output": {
        "choices": [{"finish_reason": "stop", "message": {"role": "assistant", "content": [{"text": "A gate."}]}}]
    },
    "usage": {"input_tokens": 90, "output_tokens": 3},
    "request_id": "r-9",
}


class DashScope:
    """Gives out policies for the storage at `storage_url`, and answers questions about `oss://` images."""

    def __init__(self, storage_url: str = "http://127.0.0.1:9") -> None:
        self.policy = {
            "policy": "eyJleHBpcmF0aW9uIjoi", "signature": "c2lnbmF0dXJl", "upload_dir": "dashscope-instant/yard",
            "upload_host": storage_url, "expire_in_seconds": 300, "max_file_size_mb": 100,
            "oss_access_key_id": "LTAI-storage", "x_oss_object_acl": "private", "x_oss_forbid_overwrite": "true",
        }  # fmt: skip

    async def __call__(self, link, seen):
        if seen.method == "GET":
            await link.answer({"request_id": "r-8", "data": self.policy})
        else:
            await link.answer(ANSWER)


async def get(sidecar, path=f"{POLICY_PATH}?{QUERY}", method="GET", **options):
    async with sidecar.client.request(method, sidecar.url + path, **options) as response:
        body = await response.read()
        return response, json.loads(body) if body else None


async def test_the_sdk_sends_a_local_file_to_the_storage_and_asks_about_it(serving, scripted, tmp_path):
    async def storage_script(link, seen):
        await link.answer(b"", content_type="text/plain")

    storage = await scripted(storage_script)
    upstream = await scripted(DashScope(storage.origin))
    sidecar = await serving(
        dashscope_url=f"{upstream.origin}/compatible-mode/v1", dashscope_api_key="sk-ours", dashscope_model="m"
    )
    picture = tmp_path / "gate 1.png"
    picture.write_bytes(PNG)
    process = await asyncio.create_subprocess_exec(
        real_environment(".venv-sdk"), UPLOAD, str(picture), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "DASHSCOPE_HTTP_BASE_URL": f"{sidecar.url}/api/v1", "DASHSCOPE_API_KEY": "sk-callers"},
    )  # fmt: skip
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()[-2000:]
    assert [[status, text] for status, _, text in json.loads(out)] == [[200, "A gate."]] * 2
    asked = [(seen.method, seen.path) for seen in upstream.seen]
    assert asked == [("GET", f"{POLICY_PATH}?{QUERY}"), ("POST", GENERATION)] * 2
    for seen in upstream.seen:
        assert seen.headers["authorization"] == "Bearer sk-ours"
        assert "sk-callers" not in f"{seen}"
    for seen in upstream.seen[1::2]:
        assert seen.headers["x-dashscope-ossresourceresolve"] == "enable"
        image = json.loads(seen.body)["input"]["messages"][0]["content"][0]["image"]
        assert image == "oss://dashscope-instant/yard/gate 1.png"
    assert len(storage.seen) == 2
    assert all(PNG in seen.body for seen in storage.seen)
    assert "sk-ours" not in f"{storage.seen}"


async def test_the_policy_passes_unchanged_with_the_answers_id(serving, scripted):
    script = DashScope()
    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", dashscope_native_url=f"{upstream.origin}/own")
    response, body = await get(sidecar, f"{POLICY_PATH}?{QUERY}&api_key=sk-callers")
    assert (response.status, body["data"]) == (200, script.policy)
    assert upstream.seen[0].path == f"/own/uploads?{QUERY}"
    assert (await get(sidecar, method="HEAD"))[0].status == 200
    response, _ = await get(sidecar, method="POST")
    assert (response.status, response.headers["Allow"]) == (405, "GET, HEAD")


async def test_a_bearer_token_is_asked_for_as_on_every_path(serving, scripted):
    upstream = await scripted(DashScope())
    sidecar = await serving(dashscope_url=f"{upstream.origin}/compatible-mode/v1", api_key="yard")
    assert (await get(sidecar))[0].status == 401
    assert upstream.seen == []
    assert (await get(sidecar, headers={"Authorization": "Bearer yard"}))[0].status == 200


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"dashscope_url": "http://127.0.0.1:9/v1"}, "SIDECAR_DASHSCOPE_NATIVE_URL"),
        ({"backend": "simulated"}, "SIDECAR_BACKEND=simulated is not DashScope"),
    ],
    ids=["an OpenAI-compatible upstream", "simulated"],
)
async def test_without_dashscope_the_error_says_why(serving, settings, why):
    sidecar = await serving(**settings, passthrough=True)
    for path in (f"{POLICY_PATH}?{QUERY}", "/api/v1/tasks/t-1"):
        if "backend" in settings and "tasks" in path:
            continue  # pass-through needs an upstream over HTTP
        response, body = await get(sidecar, path)
        assert (response.status, body["code"], set(body)) == (404, "not_found", {"code", "message", "request_id"})
        assert why in body["message"]
        assert QUERY not in body["message"]


async def test_a_refused_policy_is_asked_for_again_and_generations_are_not_slowed(serving, scripted):
    script = DashScope()

    async def refusing_once(link, seen):
        if len(upstream.seen) == 1:
            await link.answer({"code": "Throttling.RateQuota", "message": "slow", "request_id": "r"}, status=429)
        else:
            await script(link, seen)

    upstream = await scripted(refusing_once)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/compatible-mode/v1")
    response, _ = await get(sidecar)
    assert (response.status, response.headers["X-Sidecar-Attempts"]) == (200, "2")
    async with sidecar.client.get(f"{sidecar.admin_url}/status") as status:
        [backend] = (await status.json())["backends"]
    assert [model["model"] for model in backend["models"]] == ["(no model)"]


async def test_at_most_eight_are_in_flight_and_none_is_awaited_for_ever(serving, scripted, monkeypatch):
    monkeypatch.setattr(uploads, "_MAX_SECONDS", 0.5)
    most = 0

    async def script(link, seen):
        nonlocal most
        most = max(most, sidecar.sidecar.admission.in_flight())
        await link.gone()

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/compatible-mode/v1")
    async with asyncio.timeout(BOUND):
        answers = await asyncio.gather(*(get(sidecar) for _ in range(30)))
    assert most == 8
    assert {response.status for response, _ in answers} <= {503, 504}
    assert {body["code"] for _, body in answers} <= {"deadline_exceeded", "deadline_unreachable"}
    await sidecar.until(sidecar.at_rest)


async def test_a_policy_of_a_megabyte_is_an_error(serving, scripted):
    async def script(link, seen):
        await link.answer({"data": {"policy": "x" * 1_000_000}})

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/compatible-mode/v1")
    response, body = await get(sidecar)
    assert (response.status, body["code"]) == (502, "upstream_error")
    assert "longer than 65536 bytes" in body["message"]
    assert len(upstream.seen) == 1


async def test_the_providers_error_passes_unchanged(serving, scripted):
    error = {"code": "InvalidParameter", "message": "action is unknown", "request_id": "r-7"}

    async def script(link, seen):
        await link.answer(error, status=400)

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/compatible-mode/v1")
    response, body = await get(sidecar, f"{POLICY_PATH}?action=x")
    assert (response.status, body) == (400, error)
    assert response.headers["X-Upstream-Request-Id"] == "r-7"


# -- all of /api/v1, with pass-through ---------------------------------------------------------------------------------


async def test_with_passthrough_every_native_path_passes_under_admission(serving, scripted):
    embedding = {"output": {"embeddings": [{"embedding": [0.5], "text_index": 0}]}, "usage": {"total_tokens": 4}}
    task = {"output": {"task_id": "t-1", "task_status": "FAILED", "code": "Throttling", "message": "x"}}

    async def script(link, seen):
        if len(upstream.seen) == 1:
            await link.answer({"code": "Throttling.RateQuota", "message": "slow"}, status=429)
        else:
            await link.answer(embedding if seen.method == "POST" else task)

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/compatible-mode/v1", passthrough=True)
    path = "/api/v1/services/embeddings/text-embedding/text-embedding"
    response, body = await get(sidecar, path, "POST", json={"model": "e", "input": {"texts": ["a"]}})
    assert (response.status, body, response.headers["X-Sidecar-Attempts"]) == (200, embedding, "2")
    response, body = await get(sidecar, "/api/v1/tasks/t-1?x=1")
    assert (response.status, body) == (200, task)
    assert [seen.path for seen in upstream.seen] == [path, path, "/api/v1/tasks/t-1?x=1"]
    for climbing in ("/api/v1/..%2fadmin", "/api/v1/a/%2e%2e/%2e%2e/admin"):
        async with sidecar.client.get(URL(sidecar.url + climbing, encoded=True)) as answer:
            assert answer.status == 404
    assert len(upstream.seen) == 3


async def test_a_native_stream_of_another_path_passes_event_by_event(serving, scripted):
    events = [b'id:1\nevent:result\n:HTTP_STATUS/200\ndata:{"output":{"text":"A"}}\n\n', b'data:{"output":{}}\n\n']

    async def script(link, seen):
        assert seen.headers["x-dashscope-sse"] == "enable"
        await link.start_stream()
        for event in events:
            await link.chunk(event)
        await link.chunk(b"")

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/compatible-mode/v1", passthrough=True)
    options = {"json": {"input": {"prompt": "x"}}, "headers": {"X-DashScope-SSE": "enable"}}
    async with sidecar.client.post(f"{sidecar.url}/api/v1/apps/a-1/completion", **options) as response:
        assert (response.status, await response.read()) == (200, b"".join(events))


async def test_without_passthrough_the_other_native_paths_are_404(serving, scripted):
    upstream = await scripted(DashScope())
    sidecar = await serving(dashscope_url=f"{upstream.origin}/compatible-mode/v1")
    response, body = await get(sidecar, "/api/v1/tasks/t-1")
    assert (response.status, body["code"]) == (404, "not_found")
    assert upstream.seen == []

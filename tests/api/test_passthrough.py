"""Paths other than chat and models: forwarded to the upstream if the operator enables it, otherwise 404."""

from __future__ import annotations

import asyncio

import pytest
from running import IMAGE_URL, chat

from sidecar.admission import NO_MODEL
from sidecar.api.call import Call


async def test_without_passthrough_other_paths_are_404_in_openais_format(serving, scripted):
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    async with sidecar.post({}, path="/v1/embeddings") as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "not_found"
    assert upstream.seen == []


@pytest.mark.parametrize("base", ["/v1", "/compatible-mode/v1"])
async def test_method_path_query_body_and_content_type_are_forwarded(serving, scripted, base):
    async def script(link, seen):
        await link.answer(b"raw", content_type="application/octet-stream")

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/up", dashscope_api_key="sk-provider", passthrough=True)
    for method, path, body, kind in (
        ("POST", "/embeddings", b'{"model":"text-embedding-v4","input":"x"}', "application/json"),
        ("POST", "/files", b"--b\r\n\r\n--b--", "multipart/form-data; boundary=b"),
        ("GET", "/files/f-1/content?after=2", b"", ""),
        ("DELETE", "/files/f-1", b"", ""),
    ):
        headers = {"Content-Type": kind} if kind else {}
        url = sidecar.url + base + path
        async with sidecar.client.request(method, url, data=body or None, headers=headers) as response:
            assert (response.status, await response.read()) == (200, b"raw")
            assert response.headers["Content-Type"] == "application/octet-stream"
        seen = upstream.seen[-1]
        assert (seen.method, seen.path, seen.body) == (method, "/up" + path, body)
        assert seen.headers.get("content-type", "") == kind
        assert seen.headers["authorization"] == "Bearer sk-provider"


async def test_a_forwarded_request_waits_and_retries_like_every_other_request(serving, scripted):
    async def script(link, seen):
        if len(upstream.seen) == 1:
            await link.answer({"error": {"code": "limit_requests", "message": "slow down"}}, status=429)
        else:
            await link.answer({"data": []})

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", passthrough=True)
    async with sidecar.post({"model": "e", "input": "x"}, path="/v1/embeddings") as response:
        assert response.status == 200
        assert response.headers["X-Sidecar-Attempts"] == "2"


@pytest.mark.parametrize(
    "path",
    ["/v1/../admin", "/v1/%2e%2e/admin", "/v1/a/..%2f..%2fadmin", "/v1/..;a=b/admin", "/v1/x%5c..%3b%2fadmin"],
)
async def test_no_path_leaves_the_upstreams_base(serving, scripted, path):
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", passthrough=True)
    reader, writer = await asyncio.open_connection("127.0.0.1", sidecar.sidecar.data_port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert (await reader.read()).startswith(b"HTTP/1.1 404")
    writer.close()
    assert upstream.seen == []


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON", "APPLICATION/JSON; charset=utf-8"])
async def test_a_json_body_costs_its_tokens_however_its_type_is_spelled(serving, scripted, monkeypatch, kind):
    costs: list[float] = []
    forward = Call.forward

    async def noting(self, *args, tokens, **fields):
        costs.append(tokens)
        return await forward(self, *args, tokens=tokens, **fields)

    monkeypatch.setattr(Call, "forward", noting)
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", passthrough=True)
    body = b'{"model":"e","input":"' + b"x" * 350 + b'"}'
    url = f"{sidecar.url}/v1/embeddings"
    async with sidecar.client.post(url, data=body, headers={"Content-Type": kind}) as response:
        assert response.status == 200
    assert costs == [100.0]
    assert upstream.seen[0].headers["content-type"] == kind


async def test_a_failed_batch_passes_through_and_does_not_stop_other_requests(serving, scripted):
    errors = {"data": [{"code": "billing_hard_limit_reached", "message": "Billing hard limit has been reached"}]}
    batch = {"id": "batch_9", "object": "batch", "status": "failed", "errors": errors}

    async def script(link, seen):
        await link.answer(batch if seen.method == "GET" else {"object": "list", "data": []})

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", passthrough=True)
    async with sidecar.client.get(f"{sidecar.url}/v1/batches/batch_9") as response:
        assert (response.status, await response.json()) == (200, batch)
    async with sidecar.post({"model": "e", "input": "x"}, path="/v1/embeddings") as response:
        assert response.status == 200
    assert len(upstream.seen) == 2


@pytest.mark.parametrize("name", ["m" * 257, "", NO_MODEL])
async def test_what_cannot_be_a_models_name_is_not_kept(serving, scripted, name):
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", passthrough=True)
    async with sidecar.post({"model": name, "input": "hi"}, "/v1/embeddings") as response:
        assert response.status == 200
    assert [pool.model for pool in sidecar.sidecar.admission.status()] == [""]


@pytest.mark.parametrize(("path", "status"), [("/v1/chat/completions", 400), ("/api/inference/describe", 422)])
async def test_a_generation_cannot_use_the_queue_of_lists_and_upload_policies(serving, scripted, path, status):
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    body = {**chat(), "image_b64": IMAGE_URL.partition(",")[2], "model": NO_MODEL}
    async with sidecar.post(body, path) as response:
        assert response.status == status
    assert upstream.seen == []

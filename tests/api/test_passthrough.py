"""Paths other than chat and models: forwarded to the upstream if the operator enables it, otherwise 404."""

from __future__ import annotations

import asyncio

import pytest


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


@pytest.mark.parametrize("path", ["/v1/../admin", "/v1/%2e%2e/admin", "/v1/a/..%2f..%2fadmin"])
async def test_no_path_leaves_the_upstreams_base(serving, scripted, path):
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", passthrough=True)
    reader, writer = await asyncio.open_connection("127.0.0.1", sidecar.sidecar.data_port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert (await reader.read()).startswith(b"HTTP/1.1 404")
    writer.close()
    assert upstream.seen == []

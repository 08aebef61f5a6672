"""Who reaches what: the addresses of the listeners, the callers' key, and the paths of the admin listener."""

from __future__ import annotations

import asyncio

import pytest
from running import CHAT

from sidecar.settings import load

pytestmark = pytest.mark.http

#: Every kind of path of the data listener, with its method. The last two exist only with `SIDECAR_PASSTHROUGH`.
PATHS = {
    CHAT: "POST",
    "/compatible-mode/v1/chat/completions": "POST",
    "/api/v1/services/aigc/multimodal-generation/generation": "POST",
    "/api/inference/describe": "POST",
    "/api/inference/crop-describe": "POST",
    "/api/inference/detect": "POST",
    "/api/inference/status": "GET",
    "/v1/models": "GET",
    "/api/v1/uploads?action=getPolicy&model=m": "GET",
    "/v1/embeddings": "POST",
    "/api/v1/tasks/t-1": "GET",
}


@pytest.mark.parametrize("path", PATHS)
async def test_without_the_key_no_body_is_read_and_nothing_reaches_the_upstream(serving, scripted, path):
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", api_key="letmein", passthrough=True)
    reader, writer = await asyncio.open_connection("127.0.0.1", sidecar.sidecar.data_port)
    body = "Content-Length: 1000000\r\n" if PATHS[path] == "POST" else ""
    writer.write(f"{PATHS[path]} {path} HTTP/1.1\r\nHost: x\r\n{body}\r\n".encode())  # no byte of the body follows
    async with asyncio.timeout(5):
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 401 ")
    writer.close()
    assert upstream.seen == []


async def test_the_admin_listener_has_no_path_of_the_data_listener(serving, scripted):
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", passthrough=True)
    for path, method in PATHS.items():
        async with sidecar.client.request(method, sidecar.admin_url + path, json={"model": "m"}) as response:
            assert response.status == 404, path
    assert upstream.seen == []


def test_by_default_callers_are_reached_on_loopback_only_and_probes_from_everywhere():
    settings, _ = load({}, {})
    assert (settings.host, settings.admin_host) == ("127.0.0.1", "0.0.0.0")

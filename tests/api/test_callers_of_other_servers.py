"""What callers of other servers rely on: retries that obey, fields that only pass through, HEAD, queries, redirects."""

from __future__ import annotations

import asyncio
import json
import logging

import openai
import pytest
from running import CHAT, IMAGE_URL, chat
from yarl import URL

GENERATION = "/api/v1/services/aigc/multimodal-generation/generation"
DESCRIBE = "/api/inference/describe"


async def never(link, seen):
    await link.gone()


# -- D1: repetitions ---------------------------------------------------------------------------------------------------


async def test_a_repeated_request_never_supersedes_a_newer_frame(serving, scripted):
    upstream = await scripted(never)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", max_concurrency=1)
    admission = sidecar.sidecar.admission

    async def ask(text, retries):
        headers = {"X-Camera-Id": "yard", "X-Queue-Policy": "latest", "X-Stainless-Retry-Count": retries}
        async with sidecar.post(chat(text), headers=headers) as response:
            return response.status, response.headers.get("X-Should-Retry")

    first = asyncio.create_task(ask("in flight", "0"))
    await sidecar.until(lambda: admission.in_flight() == 1)
    newest = asyncio.create_task(ask("the newest frame", "0"))
    await sidecar.until(lambda: admission.waiting() == 1)
    try:
        assert await ask("an old frame, repeated by the client", "1") == (409, "false")
        assert (admission.waiting(), newest.done()) == (1, False)
        newer = asyncio.create_task(ask("a still newer frame", "0"))
        assert await newest == (409, "false")
        assert not newer.done()
    finally:
        for task in (first, newest, newer):
            task.cancel()
        await asyncio.gather(first, newest, newer, return_exceptions=True)


async def test_a_repeated_request_alone_waits_like_any_other_and_a_newer_one_replaces_it(serving, scripted):
    upstream = await scripted(never)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", max_concurrency=1)
    admission = sidecar.sidecar.admission

    async def ask(retries):
        headers = {"X-Camera-Id": "yard", "X-Queue-Policy": "latest", "X-Stainless-Retry-Count": retries}
        async with sidecar.post(headers=headers) as response:
            return response.status

    tasks = [asyncio.create_task(ask("0"))]
    await sidecar.until(lambda: admission.in_flight() == 1)
    tasks.append(asyncio.create_task(ask("2")))
    await sidecar.until(lambda: admission.waiting() == 1)
    tasks.append(asyncio.create_task(ask("0")))
    assert await tasks[1] == 409
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_the_official_client_does_not_repeat_a_final_error(serving, scripted):
    async def fail(link, seen):
        await link.answer({"error": {"message": "broken"}}, status=500)

    upstream = await scripted(fail)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", deadline=5)
    async with openai.AsyncOpenAI(base_url=f"{sidecar.url}/v1", api_key="unused", max_retries=4) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(**chat())
    assert caught.value.status_code == 502
    name = 'sidecar_requests_total{api="openai",backend="dashscope",outcome="error"}'
    await sidecar.until(sidecar.at_rest)
    assert (await sidecar.metrics())[name] == 1


# -- D3: fields that only pass through ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": -1},
        {"max_tokens": 0},
        {"max_tokens": 256.0},
        {"max_tokens": "512"},
        {"max_completion_tokens": None},
        {"temperature": "warm"},
        {"messages": [{"role": "user", "content": ["What is this?", {"type": "image_url", "image_url": IMAGE_URL}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": None}, 7]}]},
    ],
    ids=str,
)
async def test_what_is_only_passed_on_is_left_to_the_provider_to_judge(serving, scripted, fields):
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    async with sidecar.post(chat(**fields)) as response:
        assert response.status == 200, await response.text()
    assert json.loads(upstream.seen[-1].body) == chat(**fields)


# -- D7, F10: methods --------------------------------------------------------------------------------------------------


@pytest.mark.http
@pytest.mark.parametrize("path", ["/health", "/v1/models", "/compatible-mode/v1/models", "/api/inference/status"])
async def test_head_is_answered_like_get_without_the_body(serving, path):
    sidecar = await serving()
    async with sidecar.client.get(sidecar.url + path) as full, sidecar.client.head(sidecar.url + path) as head:
        body = await full.read()
        assert (head.status, await head.read()) == (200, b"")
        assert head.headers["Content-Type"] == full.headers["Content-Type"]
        assert abs(int(head.headers["Content-Length"]) - len(body)) <= 2  # the uptime may have more digits
    sidecar.sidecar.drain()
    async with sidecar.client.head(f"{sidecar.url}/health") as head:
        assert head.status == 503


async def test_head_passes_through_as_head(serving, scripted):
    async def script(link, seen):
        await link.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n")

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", passthrough=True)
    for _ in range(2):
        async with sidecar.client.head(f"{sidecar.url}/v1/files/f-9") as response:
            assert (response.status, await response.read()) == (200, b"")
    assert [(seen.method, seen.path) for seen in upstream.seen] == [("HEAD", "/v1/files/f-9")] * 2


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", CHAT, "POST"),
        ("HEAD", CHAT, "POST"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("PUT", "/health", "GET, HEAD"),
        ("OPTIONS", DESCRIBE, "POST"),
        ("GET", GENERATION, "POST"),
    ],
)
async def test_a_wrong_method_gets_405_and_the_methods_of_the_path(serving, method, path, allow):
    sidecar = await serving()
    async with sidecar.client.request(method, sidecar.url + path) as response:
        assert (response.status, response.headers["Allow"]) == (405, allow)


async def test_the_admin_listener_names_the_methods_too(serving):
    sidecar = await serving()
    for method, path, allow in (("POST", "/livez", "GET, HEAD"), ("GET", "/drain", "POST"), ("PUT", "/", "GET, HEAD")):
        async with sidecar.client.request(method, sidecar.admin_url + path) as response:
            assert (response.status, response.headers["Allow"]) == (405, allow)
    for path in ("/metrics", "/status", "/readyz", "/history", "/page.js"):
        async with sidecar.client.head(sidecar.admin_url + path) as response:
            assert (response.status, await response.read()) == (200, b"")


# -- D13: query and headers --------------------------------------------------------------------------------------------


async def test_the_query_and_the_headers_of_openrouter_are_passed_on_but_no_key_of_a_caller(serving, scripted):
    upstream = await scripted()
    sidecar = await serving(
        dashscope_url=f"{upstream.origin}/v1", dashscope_native_url=f"{upstream.origin}/api/v1", passthrough=True,
        dashscope_api_key="sk-ours",
    )  # fmt: skip
    headers = {
        "HTTP-Referer": "https://cameras.example", "X-Title": "Yard cameras",
        "api-key": "sk-callers", "X-Api-Key": "sk-callers", "Authorization": "Bearer sk-callers",
    }  # fmt: skip
    native = {"model": "m", "input": {"messages": [{"content": [{"text": "?"}]}]}}
    query = "api-version=2024-10-21&deployment=a%20b"
    for path, upstream_path, body in (
        (CHAT, "/v1/chat/completions", chat()),
        (GENERATION, GENERATION, native),
        ("/v1/embeddings", "/v1/embeddings", {"model": "e", "input": "x"}),
    ):
        secret = "&api-key=sk-callers&KEY=sk-callers&access%5Ftoken=sk-callers"
        async with sidecar.client.post(f"{sidecar.url}{path}?{query}{secret}", json=body, headers=headers) as response:
            assert response.status == 200, await response.text()
        seen = upstream.seen[-1]
        assert seen.path == f"{upstream_path}?{query}"
        assert (seen.headers["http-referer"], seen.headers["x-title"]) == ("https://cameras.example", "Yard cameras")
        assert seen.headers["authorization"] == "Bearer sk-ours"
        assert "sk-callers" not in f"{seen}"


@pytest.mark.parametrize(
    "name",
    [
        "sig", "auth", "password", "id_token", "X-Api-Key", "client_secret", "apiKey", "APIKey", "apikey", "api%2Dkey",
        "%6bey", "authorization", "jwt", "X-Amz-Signature", "X-Amz-Credential", "sessionid", "session_id", "user[pwd]",
        "auth_token2", "Ocp-Apim-Subscription-Key",
    ],
)  # fmt: skip
@pytest.mark.parametrize("before", ["?", "?a=1&", "?a=1;"])
async def test_no_parameter_that_is_named_like_a_secret_reaches_the_provider(serving, scripted, name, before):
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    url = URL(f"{sidecar.url}{CHAT}{before}{name}=sk-callers", encoded=True)
    async with sidecar.client.post(url, json=chat()) as response:
        assert response.status == 200, await response.text()
    assert upstream.seen[-1].path == f"/v1/chat/completions{before.rstrip('?&;')}"


HARMLESS = "api-version=2024-10-21&deployment=a%20b&max_tokens=5&keywords=x;y&keyframe=1&author=me&design=z"


async def test_other_parameters_pass_unchanged(serving, scripted):
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    url = URL(f"{sidecar.url}{CHAT}?{HARMLESS}", encoded=True)
    async with sidecar.client.post(url, json=chat()) as response:
        assert response.status == 200, await response.text()
    assert upstream.seen[-1].path == f"/v1/chat/completions?{HARMLESS}"


async def test_of_the_headers_of_dashscope_those_named_like_a_secret_are_not_passed_on(serving, scripted):
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    secret = ("X-DashScope-Api-Key", "x-dashscope-apikey", "X-DashScope-Authorization", "X-DashScope-Security-Token")
    passed = ("x-dashscope-workspace", "x-dashscope-datainspection", "x-dashscope-session-cache")
    headers = dict.fromkeys(secret, "sk-callers") | dict.fromkeys(passed, "enable")
    async with sidecar.post(headers=headers) as response:
        assert response.status == 200, await response.text()
    seen = upstream.seen[-1]
    assert "sk-callers" not in f"{seen}"
    assert {name for name in seen.headers if name.startswith("x-dashscope-")} == set(passed)


async def test_a_native_request_that_is_translated_keeps_its_query(serving, scripted):
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    body = {"model": "m", "input": {"messages": [{"role": "user", "content": [{"text": "?"}]}]}}
    async with sidecar.post(body, path=f"{GENERATION}?api-version=7") as response:
        assert response.status == 200, await response.text()
    assert upstream.seen[-1].path == "/v1/chat/completions?api-version=7"


# -- D10: a key that is a secret ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["Authorization", "Cookie", "X-Api-Key", "X-Auth-Token"])
async def test_a_key_from_a_secret_header_is_a_short_hash_everywhere(serving, scripted, caplog, header):
    caplog.set_level(logging.INFO)
    upstream = await scripted(never)
    sidecar = await serving(
        dashscope_url=f"{upstream.origin}/v1", max_concurrency=1, key_header=header, access_log=True
    )
    secrets = ["Bearer sk-of-camera-one", "Bearer sk-of-camera-one", "Bearer " + "t" * 900]

    async def ask(secret):
        async with sidecar.post(headers={header: secret}) as response:
            return response.status

    tasks = [asyncio.create_task(ask(secret)) for secret in secrets + secrets]
    admission = sidecar.sidecar.admission
    await sidecar.until(lambda: (admission.in_flight(), admission.waiting()) == (1, 5))
    async with sidecar.client.get(f"{sidecar.admin_url}/status") as response:
        status = await response.text()
    queues = json.loads(status)["backends"][0]["models"][0]["longest_queues"]
    assert sorted(queue["requests"] for queue in queues) in ([1, 4], [2, 3])  # each camera has a queue of its own
    assert all(queue["key"].startswith("hash-") and len(queue["key"]) <= 20 for queue in queues)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await sidecar.until(sidecar.at_rest)
    assert "key=hash-" in caplog.text or any(getattr(line, "key", "").startswith("hash-") for line in caplog.records)
    for secret in ("sk-of-camera-one", "ttt"):
        assert secret not in status
        assert all(secret not in f"{vars(line)}" for line in caplog.records)


# -- F7: paths as trio-core takes them ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "location"),
    [
        ("/health/", "/health"),
        ("/health//", "/health"),
        ("/api/inference/status/?a=b%20c", "/api/inference/status?a=b%20c"),
        ("/api/inference/d%65tect/", "/api/inference/detect"),
        ("/v1/models/", "/v1/models"),
    ],
)
async def test_a_slash_too_many_is_redirected_with_307(serving, path, location):
    sidecar = await serving(api_key="letmein")
    async with sidecar.client.get(sidecar.url + path, allow_redirects=False) as response:
        assert (response.status, response.headers["Location"], await response.read()) == (307, location, b"")


async def test_a_client_that_follows_the_redirect_is_answered_and_an_escaped_path_is_too(serving):
    sidecar = await serving()
    body = {"image_b64": IMAGE_URL.partition(",")[2]}
    async with sidecar.post(body, path=f"{DESCRIBE}/") as response:
        assert (response.status, response.url.path) == (200, DESCRIBE)
    reader, writer = await asyncio.open_connection("127.0.0.1", sidecar.sidecar.data_port)
    writer.write(b"GET /h%65alth HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert b"uptime_s" in await reader.read()
    writer.close()

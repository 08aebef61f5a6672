"""Every request that reaches an upstream holds a permit of admission and is counted, whatever path a caller used."""

from __future__ import annotations

import pytest
from running import IMAGE_URL, chat
from scripted_upstream import CHAT_ANSWER

NATIVE = {"model": "m", "input": {"messages": [{"role": "user", "content": [{"text": "?"}]}]}}
TRIO = {"image_b64": IMAGE_URL.partition(",")[2], "prompt": "?"}
PATHS = {
    "/v1/chat/completions": chat(),
    "/compatible-mode/v1/chat/completions": chat(),
    "/api/v1/services/aigc/multimodal-generation/generation": NATIVE,
    "/api/inference/describe": TRIO,
    "/api/inference/crop-describe": TRIO,
    "/v1/models": None,
    "/api/v1/uploads?action=getPolicy&model=m": None,
    "/v1/embeddings": {"model": "e", "input": "x"},
    "/v1/responses": {"model": "r", "input": "x"},
    "/v1/files/f-1": None,
    "/api/v1/services/embeddings/text-embedding/text-embedding": {"model": "e", "input": {"texts": ["x"]}},
    "/api/v1/tasks/t-1": None,
}
QUIET = {"/health": None, "/api/inference/status": None}


@pytest.mark.parametrize("path", [*PATHS, *QUIET])
async def test_what_reaches_the_upstream_holds_a_permit_and_is_counted(serving, scripted, path):
    in_flight = []

    async def script(link, seen):
        in_flight.append(sidecar.sidecar.admission.in_flight())
        await link.answer(CHAT_ANSWER)

    upstream = await scripted(script)
    sidecar = await serving(
        dashscope_url=f"{upstream.origin}/v1", dashscope_native_url=f"{upstream.origin}/api/v1", passthrough=True
    )
    body = PATHS.get(path)
    async with sidecar.client.request("POST" if body else "GET", sidecar.url + path, json=body) as response:
        assert response.status == 200, await response.text()
    expected = [1] if path in PATHS else []
    assert in_flight == expected
    metrics = await sidecar.metrics()
    assert metrics.get('sidecar_upstream_attempts_total{backend="dashscope",result="ok"}', 0) == len(expected)
    await sidecar.until(sidecar.at_rest)


async def test_the_query_and_the_headers_of_openrouter_reach_responses_too(serving, scripted):
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", passthrough=True)
    headers = {"HTTP-Referer": "https://yard.example", "X-Title": "Yard", "api-key": "sk-callers"}
    async with sidecar.post({"input": "x"}, path="/v1/responses?api-version=1&token=sk", headers=headers) as response:
        assert response.status == 200
    [seen] = upstream.seen
    assert seen.path == "/v1/responses?api-version=1"
    assert (seen.headers["http-referer"], seen.headers["x-title"]) == ("https://yard.example", "Yard")
    assert "sk" not in f"{seen.headers.values()} {seen.path}"

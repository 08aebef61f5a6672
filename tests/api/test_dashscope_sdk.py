"""The official dashscope SDK, unmodified, in its own environment, because its dependencies must not affect ours."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from pathlib import Path

import pytest
from real_parts import real_environment
from running import IMAGE_URL

CALLS = Path(__file__).parent / "dashscope_sdk_calls.py"


async def calls(sidecar) -> dict:
    """Return what the SDK received for each way to call it: lists of status, code, text, output tokens, has an id."""
    process = await asyncio.create_subprocess_exec(
        real_environment(".venv-sdk"), CALLS, IMAGE_URL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "DASHSCOPE_HTTP_BASE_URL": f"{sidecar.url}/api/v1", "DASHSCOPE_API_KEY": "caller"},
    )  # fmt: skip
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()[-2000:]
    return json.loads(out)


@pytest.mark.parametrize("backend", ["dashscope", "simulated", "translated"])
async def test_the_sdk_gets_whole_and_streamed_answers_sync_and_async(serving, provider, backend):
    url, _ = await provider(answer_tokens=30)
    if backend == "translated":
        url = url.replace("/compatible-mode", "")
    sidecar = await serving(**({"backend": "simulated"} if backend == "simulated" else {"dashscope_url": url}))
    for found in (await calls(sidecar)).values():
        status, code, text, tokens, identified = found["whole"]
        assert (status, code or "", identified) == (200, "", True)
        assert text
        assert tokens > 0
        for incremental in (False, True):
            pieces = found[f"incremental {incremental}"]
            assert len(pieces) > 2
            assert {piece[0] for piece in pieces} == {200}
            texts = [piece[2] for piece in pieces]
            assert len("".join(texts) if incremental else texts[-1]) > 20


async def test_the_sdk_gets_the_providers_refusals_unchanged(serving, provider):
    url, _ = await provider(moderation_share=1.0)
    for found in (await calls(await serving(dashscope_url=url))).values():
        whole, streamed = found["whole"], found["incremental True"][0]
        assert (whole[0], whole[1]) == (400, "DataInspectionFailed")
        assert (streamed[0], streamed[1]) == (400, "DataInspectionFailed")


async def test_the_sdk_never_sees_a_throttling_refusal(serving, provider):
    url, simulated = await provider(requests_per_second=3, burst_requests=1, in_stream_errors=True)
    found = await calls(await serving(dashscope_url=url))
    assert {how["whole"][0] for how in found.values()} == {200}
    assert {piece[0] for how in found.values() for piece in how["incremental True"]} == {200}
    assert simulated.counts.refused["request_rate"] > 0

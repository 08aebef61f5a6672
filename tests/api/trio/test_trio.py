"""trio-core's inference API over real sockets: the requests of cortex and the answers it gets."""

from __future__ import annotations

import asyncio
import base64
import json
from io import BytesIO

import pytest
from PIL import Image
from running import PNG
from scripted_upstream import CHAT_ANSWER

DESCRIBE = "/api/inference/describe"
CROP_DESCRIBE = "/api/inference/crop-describe"


def frame(width: int = 640, height: int = 360) -> str:
    """Return a JPEG in base64."""
    jpeg = BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(jpeg, "JPEG")
    return base64.b64encode(jpeg.getvalue()).decode()


FRAME = frame()
IMAGE = base64.b64encode(PNG).decode()


def answering(text: str):
    """Return a provider's script that answers with this text."""
    message = {"role": "assistant", "content": text}
    answer = {**CHAT_ANSWER, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}

    async def script(link, seen):
        await link.answer(answer)

    return script


@pytest.fixture
async def asking(serving, scripted):
    """Return a function that starts a sidecar and a provider that answers with `text`.

    It returns `post` and the provider. `await post(body, path)` returns status and JSON.
    """

    async def start(text: str = "A gate.", script=None, **settings):
        upstream = await scripted(script or answering(text))
        sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", **settings)

        async def post(body, path: str = DESCRIBE, **options):
            async with sidecar.post(body, path=path, **options) as response:
                return response.status, await response.json()

        post.sidecar = sidecar  # type: ignore[attr-defined]
        return post, upstream

    return start


async def test_describe_sends_the_callers_image_unchanged_and_returns_the_text(asking):
    post, upstream = await asking("<think>hm</think> Two people at a gate. ")
    status, answer = await post({"image_b64": FRAME, "prompt": "What is there?"})
    assert status == 200
    assert answer.pop("elapsed_ms") >= 0
    assert answer == {"description": "Two people at a gate."}
    sent = json.loads(upstream.seen[0].body)
    image, text = sent.pop("messages")[0]["content"]
    assert image["image_url"]["url"] == f"data:image/jpeg;base64,{FRAME}"
    assert text == {"type": "text", "text": "What is there?"}
    assert sent == {"model": "qwen-vl-plus", "max_tokens": 512, "temperature": 0.0, "top_p": 1.0}


async def test_describe_forwards_the_callers_parameters_to_the_provider(asking):
    post, upstream = await asking()
    schema = {"type": "json_object"}
    extra = {"enable_thinking": False, "seed": 2**70, "stream": True}
    body = {"image_b64": FRAME, "model": "qwen-vl-max", "max_tokens": 16384, "response_format": schema}
    assert (await post({**body, "extra_body": extra}))[0] == 200
    sent = json.loads(upstream.seen[0].body)
    assert (sent["model"], sent["max_tokens"], sent["response_format"]) == ("qwen-vl-max", 16384, schema)
    assert (sent["enable_thinking"], sent["seed"]) == (False, 2**70)
    assert "stream" not in sent


async def test_a_throttling_429_causes_a_wait_and_never_a_422(serving, provider):
    url, simulated = await provider(requests_per_second=20, burst_requests=1)
    sidecar = await serving(dashscope_url=url)

    async def describe() -> int:
        async with sidecar.post({"image_b64": IMAGE}, path=DESCRIBE) as response:
            return response.status

    assert await asyncio.gather(*(describe() for _ in range(10))) == [200] * 10
    assert simulated.counts.refused["request_rate"] > 0


async def test_a_refusal_of_the_request_itself_is_422_with_the_fields_that_cortex_reads(serving, provider):
    url, _ = await provider(moderation_share=1.0)
    sidecar = await serving(dashscope_url=url)
    async with sidecar.post({"image_b64": IMAGE}, path=DESCRIBE) as response:
        assert response.status == 422
        detail = (await response.json())["detail"]
    assert detail["kind"] == "vlm_client_error"
    assert (detail["upstream_status"], detail["moderated"]) == (400, True)
    assert "data_inspection_failed" in detail["message"]
    metrics = await sidecar.metrics()
    assert metrics['sidecar_requests_total{api="trio",backend="dashscope",outcome="moderated"}'] == 1


@pytest.mark.parametrize(
    ("body", "status", "where"),
    [
        ({}, 422, ["body", "image_b64"]),
        ({"image_b64": 5}, 422, ["body", "image_b64"]),
        ({"image_b64": IMAGE, "max_tokens": 0}, 422, ["body", "max_tokens"]),
        ({"image_b64": IMAGE, "max_tokens": 16385}, 422, ["body", "max_tokens"]),
        ({"image_b64": IMAGE, "prompt": "x" * 4097}, 422, ["body", "prompt"]),
        ([], 422, ["body"]),
    ],
)
async def test_an_invalid_body_is_422_in_fastapis_format(asking, body, status, where):
    post, upstream = await asking()
    got, answer = await post(body)
    assert got == status
    (entry,) = answer["detail"]
    assert entry["loc"] == where
    assert entry.keys() >= {"type", "loc", "msg", "input"}
    assert upstream.seen == []


@pytest.mark.parametrize("path", [DESCRIBE, CROP_DESCRIBE])
@pytest.mark.parametrize("image", ["", "A", "AAAA", base64.b64encode(b"<html>no image</html>").decode()])
async def test_an_invalid_image_is_400_and_the_error_says_so(asking, path, image):
    post, upstream = await asking()
    status, answer = await post({"image_b64": image}, path)
    assert status == 400
    assert answer["detail"].startswith("Invalid image data: image_b64")
    assert upstream.seen == []


async def test_invalid_json_is_422_and_a_body_that_is_too_large_is_413(asking):
    post, _ = await asking(max_body_bytes=100_000)
    sidecar = post.sidecar
    json_header = {"Content-Type": "application/json"}
    async with sidecar.client.post(sidecar.url + DESCRIBE, data=b"{nope", headers=json_header) as response:
        assert response.status == 422
        assert (await response.json())["detail"][0]["type"] == "json_invalid"
    status, answer = await post({"image_b64": "A" * 200_000})
    assert status == 413
    assert answer["error"] == "payload_too_large"
    assert answer["detail"] == answer["message"]


async def test_errors_of_the_sidecar_have_a_detail_and_retry_after(asking):
    async def silent(link, seen):
        await link.gone()

    post, _ = await asking(script=silent)
    status, answer = await post({"image_b64": IMAGE}, headers={"X-Request-Timeout": "0.2"})
    assert status == 504
    assert "0.2 s" in answer["detail"]
    post.sidecar.sidecar.admission.draining = True
    async with post.sidecar.post({"image_b64": IMAGE}, path=DESCRIBE) as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "1")
        assert "shutting down" in (await response.json())["detail"]


async def test_health_answers_without_the_key_and_status_only_with_the_key(asking):
    post, _ = await asking(api_key="letmein", dashscope_model="qwen-vl-max")
    sidecar = post.sidecar
    async with sidecar.client.get(f"{sidecar.url}/health") as response:
        answer = await response.json()
        assert isinstance(answer.pop("uptime_s"), int)
        assert answer == {"status": "ok", "service": "trio-core-inference"}
    async with sidecar.client.get(f"{sidecar.url}/api/inference/status") as response:
        assert response.status == 401
        assert (await response.json()).keys() == {"detail"}
    key = {"Authorization": "Bearer letmein"}
    async with sidecar.client.get(f"{sidecar.url}/api/inference/status", headers=key) as response:
        assert await response.json() == {"vlm_loaded": True, "vlm_model": "qwen-vl-max", "yolo_loaded": False}


async def test_elapsed_ms_excludes_the_wait_in_the_queue(asking):
    async def slow(link, seen):
        await asyncio.sleep(0.15)
        await link.answer(CHAT_ANSWER)

    post, _ = await asking(script=slow, max_concurrency=1)

    async def parts() -> tuple[float, float, float]:
        async with post.sidecar.post({"image_b64": IMAGE}, path=DESCRIBE) as response:
            timing = dict(part.split(";dur=") for part in response.headers["Server-Timing"].split(", "))
            return (await response.json())["elapsed_ms"], float(timing["queue"]), float(timing["total"])

    timings = await asyncio.gather(*(parts() for _ in range(3)))
    assert max(queue for _, queue, _ in timings) > 250
    for elapsed, queue, total in timings:
        assert abs(total - queue - elapsed) < 2, timings


async def test_a_frame_of_10_mb_is_answered(asking):
    post, upstream = await asking()
    image = base64.b64encode(base64.b64decode(FRAME) + bytes(9_900_000)).decode()
    status, _ = await post({"image_b64": image})
    assert status == 200
    sent = json.loads(upstream.seen[0].body)["messages"][0]["content"][0]["image_url"]["url"]
    assert sent == f"data:image/jpeg;base64,{image}"

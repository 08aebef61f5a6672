"""trio-core's inference API, so that its callers need no change: a question about a frame in, text and entities out.

What each answer looks like is trio-core 1.1.5's; what is different is listed, with the reason, in docs/trio-core.md.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from backends.base import Rejected, Request
from backends.http1.response import Answer
from backends.media import base64_size, image_tokens
from sidecar.admission import Draining, Ticket
from sidecar.api.body import CHARS_PER_TOKEN, UNKNOWN_IMAGE_TOKENS
from sidecar.api.call import Call
from sidecar.api.errors import InvalidRequest
from sidecar.api.trio.chat import answer_text, chat_body
from sidecar.api.trio.crops import scene_prompt
from sidecar.api.trio.image import compose, media_type, not_an_image
from sidecar.api.trio.schema import CropDescribeRequest, DescribeRequest, DetectRequest, read
from sidecar.api.trio.text import crop_descriptions, describe_scene, strip_thinking

_Asked = TypeVar("_Asked", DescribeRequest, CropDescribeRequest, DetectRequest)

#: Bodies above this are checked in a thread: one of 10 MB takes 10 ms, in which the loop would serve nobody.
_THREAD_BYTES = 1 << 20
#: Composites are drawn by two at a time: each decoded frame may take 150 MB, and the loop needs its share of a core.
_DRAWING = ThreadPoolExecutor(2, "composite")
#: What trio-core counts as one; a bicycle is none.
_VEHICLES = ("car", "bus", "truck", "motorcycle")
_LOADED = time.monotonic()


async def describe(call: Call) -> Answer:
    """`POST /api/inference/describe`: the model's answer to one prompt about one frame."""
    asked, image = await _read(call, DescribeRequest)
    request, ticket = _question(call, asked, asked.prompt, image, media_type(image))
    del image  # a view of the caller's body: the question holds the one copy from here on
    text = await _ask(call, request, ticket)
    return await _respond(call, {"description": text, "elapsed_ms": _elapsed_ms(ticket)})


async def crop_describe(call: Call) -> Answer:
    """`POST /api/inference/crop-describe`: the scene, what is in it, and what each enlarged detection looks like."""
    asked, image = await _read(call, CropDescribeRequest)
    kind = media_type(image)
    composite = None
    if asked.crops and asked.max_crops:
        loop = asyncio.get_running_loop()
        composite = await loop.run_in_executor(_DRAWING, compose, image, asked.crops, asked.max_crops)
    panels = composite.panels if composite else []
    prompt = scene_prompt(asked.scene_prompt, asked.crops, panels)
    if composite is not None:
        image, kind = memoryview(composite.image_b64), "image/jpeg"
    request, ticket = _question(call, asked, prompt, image, kind)
    del image, composite
    text = await _ask(call, request, ticket)
    description, entities = describe_scene(text)
    answer = {
        "description": description,
        "entities": entities,
        "crop_descriptions": crop_descriptions(text, [(panel.label, panel.kind) for panel in panels]),
        "elapsed_ms": _elapsed_ms(ticket),
    }
    return await _respond(call, answer)


async def detect(call: Call) -> Answer:
    """`POST /api/inference/detect`: what the operator's model finds in a frame."""
    _, image = await _read(call, DetectRequest)
    if call.detector is None:
        raise InvalidRequest(
            "no detector is configured: set SIDECAR_DETECTOR_MODEL to an ONNX file of YOLOv8, v10, v11 or RT-DETR, "
            "and install vlm-sidecar[detect]",
            status=503,
        )
    media_type(image)
    body = bytes(image)
    del image
    ticket = call.admit(model="detector", tokens=0.0, size_bytes=len(body))
    request = Request("openai", "/detect", body, "detector", deadline=ticket.deadline)
    del body
    try:
        reply = await call.detect(request, ticket, call.detector)
    except Rejected as error:
        raise not_an_image(error.message) from error
    found = json.loads(reply.body)
    counts = Counter(detection["class"] for detection in found)
    answer = {
        "people_count": counts["person"],
        "vehicle_count": sum(counts[kind] for kind in _VEHICLES),
        "by_class": counts,
        "crops_b64": found,
        "elapsed_ms": _elapsed_ms(ticket),
    }
    return await _respond(call, answer)


async def status(call: Call) -> Answer:
    """`GET /api/inference/status`: what is loaded. The data listener opens once the backend has started."""
    answer = {"vlm_loaded": True, "vlm_model": call.limits.default_model, "yolo_loaded": call.detector is not None}
    return await _respond(call, answer)


async def health(call: Call) -> Answer:
    """`GET /health`: that this process serves, and for how many seconds it has; 503 in a drain, for load balancers."""
    if call.draining:
        raise Draining("the sidecar is shutting down and takes no new work: try again in 1 s", retry_after=1.0)
    uptime = int(time.monotonic() - _LOADED)
    return await _respond(call, {"status": "ok", "service": "trio-core-inference", "uptime_s": uptime})


async def _read(call: Call, kind: type[_Asked]) -> tuple[_Asked, memoryview]:
    body, content_type = await call.read(), call.http.headers.get("Content-Type", "")
    if len(body) > _THREAD_BYTES:
        return await asyncio.to_thread(read, kind, body, content_type)
    return read(kind, body, content_type)


def _question(
    call: Call, asked: DescribeRequest | CropDescribeRequest, prompt: str, image: memoryview, media: str
) -> tuple[Request, Ticket]:
    """The chat completion that asks the provider, and its place in the queue."""
    try:
        body, model = chat_body(
            image,
            media,
            prompt,
            model=asked.model or call.limits.default_model,
            max_tokens=asked.max_tokens,
            response_format=asked.response_format,
            extra_body=asked.extra_body,
        )
    except ValueError as error:
        raise InvalidRequest(f"the body holds what no JSON can: {error}") from None
    size = base64_size(image)
    tokens = len(prompt) / CHARS_PER_TOKEN + (UNKNOWN_IMAGE_TOKENS if size is None else image_tokens(*size, model))
    ticket = call.admit(model=model, tokens=tokens, size_bytes=len(body))
    request = Request("openai", "/chat/completions", body, model, headers=call.passed_on(), deadline=ticket.deadline)
    return request, ticket


async def _ask(call: Call, request: Request, ticket: Ticket) -> str:
    """What the model said, without its thinking."""
    reply = await call.ask(request, ticket)
    return strip_thinking(answer_text(reply.body))


def _elapsed_ms(ticket: Ticket) -> int:
    """Milliseconds since the work began: like trio-core's, which starts to count behind its semaphore."""
    total = ticket.stopwatch.stop(asyncio.get_running_loop().time())
    return int((total - ticket.stopwatch.seconds["queue"]) * 1000)


async def _respond(call: Call, answer: dict[str, Any]) -> Answer:
    # Not orjson: entities hold what a model wrote, integers of any length and halves of characters among it.
    body = json.dumps(answer, separators=(",", ":")).encode()
    return await call.respond(200, body, {"Content-Type": "application/json"})

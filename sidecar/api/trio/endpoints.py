"""The endpoints of trio-core's inference API: a question about a frame in, text and entities out.

The format of each answer is that of trio-core 1.1.5. docs/trio-core.md lists every difference with its reason.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from functools import partial
from typing import Any, TypeVar

from backends.base import Rejected, Request, ServerFailed
from backends.http1.interface import Answer
from backends.media import CHARS_PER_TOKEN, base64_size, image_tokens
from backends.picture_memory import PICTURES
from sidecar.admission import Draining, Ticket
from sidecar.api.body import UNKNOWN_IMAGE_TOKENS
from sidecar.api.call import Call
from sidecar.api.errors import InvalidRequest
from sidecar.api.key import fair_queue_key
from sidecar.api.trio.chat import answer_text, chat_body
from sidecar.api.trio.crops import scene_prompt
from sidecar.api.trio.image import compose, media_type, not_an_image
from sidecar.api.trio.schema import CropDescribeRequest, DescribeRequest, DetectRequest, is_quick, parse_request
from sidecar.api.trio.text import crop_descriptions, describe_scene, strip_thinking

_RequestT = TypeVar("_RequestT", DescribeRequest, CropDescribeRequest, DetectRequest)

#: The classes that trio-core counts as vehicles. A bicycle is not one of them.
_VEHICLES = ("car", "bus", "truck", "motorcycle")
_LOADED = time.monotonic()


async def describe(call: Call) -> Answer:
    """Answer `POST /api/inference/describe` with the model's answer to one prompt about one frame."""
    given, image = await _read(call, DescribeRequest)
    request, ticket = _question(call, given, given.prompt, image, media_type(image))
    del image  # it is a view of the caller's body; from here on, only the request holds a copy
    text = await _ask(call, request, ticket)
    return await _respond(call, {"description": text, "elapsed_ms": _elapsed_ms(ticket)})


async def crop_describe(call: Call) -> Answer:
    """Answer `POST /api/inference/crop-describe` with the scene, its entities and one text for each zoom panel."""
    given, image = await _read(call, CropDescribeRequest)
    kind = media_type(image)
    composite = None
    if given.crops and given.max_crops:
        key = fair_queue_key(call.http.headers, call.settings.key_header)
        composite = await PICTURES.run(key, partial(compose, image, given.crops, given.max_crops))
    panels = composite.panels if composite else []
    prompt = scene_prompt(given.scene_prompt, given.crops, panels)
    if composite is not None:
        image, kind = memoryview(composite.image_b64), "image/jpeg"
    request, ticket = _question(call, given, prompt, image, kind)
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
    """Answer `POST /api/inference/detect` with the detections of the operator's model in a frame."""
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
    ticket = call.make_ticket(model="detector", tokens=0.0, size_bytes=len(body))
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
    """Answer `GET /api/inference/status`: which models are loaded.

    `vlm_loaded` is always true, because the data listener opens only after the backend has started.
    """
    answer = {"vlm_loaded": True, "vlm_model": call.settings.default_model, "yolo_loaded": call.detector is not None}
    return await _respond(call, answer)


async def health(call: Call) -> Answer:
    """Answer `GET /health` with the uptime in seconds. In a drain, answer 503, so that load balancers send no more."""
    if call.draining:
        raise Draining("the sidecar is shutting down and takes no new work: try again in 1 s", retry_after=1.0)
    uptime = int(time.monotonic() - _LOADED)
    return await _respond(call, {"status": "ok", "service": "trio-core-inference", "uptime_s": uptime})


async def _read(call: Call, kind: type[_RequestT]) -> tuple[_RequestT, memoryview]:
    body, content_type = await call.read(), call.http.headers.get("Content-Type", "")
    parse = partial(parse_request, kind, content_type=content_type)
    return parse(body) if is_quick(body) else await call.parse_in_turn(body, parse)


def _question(
    call: Call, given: DescribeRequest | CropDescribeRequest, prompt: str, image: memoryview, media: str
) -> tuple[Request, Ticket]:
    """Return the chat completion for the provider, and its ticket. Raises `InvalidRequest`."""
    try:
        body, model = chat_body(
            image,
            media,
            prompt,
            model=given.model or call.settings.default_model,
            max_tokens=given.max_tokens,
            response_format=given.response_format,
            extra_body=given.extra_body,
            sampling=call.settings.sampling,
        )
    except ValueError as error:
        raise InvalidRequest(f"the body holds what no JSON can: {error}") from None
    size = base64_size(image)
    tokens = len(prompt) / CHARS_PER_TOKEN + (UNKNOWN_IMAGE_TOKENS if size is None else image_tokens(*size, model))
    ticket = call.make_ticket(model=model, tokens=tokens, size_bytes=len(body))
    request = Request(
        "openai", "/chat/completions", body, model, headers=call.forwarded_headers(), deadline=ticket.deadline
    )
    return request, ticket


async def _ask(call: Call, request: Request, ticket: Ticket) -> str:
    """Send the request and return the text of the answer without the model's thinking."""
    reply = await call.ask(request, ticket)
    if encoding := reply.headers.get("Content-Encoding"):
        raise ServerFailed(f"the provider's answer has the encoding {encoding[:40]}, although none was asked for")
    return strip_thinking(answer_text(reply.body))


def _elapsed_ms(ticket: Ticket) -> int:
    """Return the milliseconds since the request left the queue. trio-core also starts its clock after its semaphore."""
    total = ticket.stopwatch.stop(asyncio.get_running_loop().time())
    return int((total - ticket.stopwatch.seconds["queue"]) * 1000)


async def _respond(call: Call, answer: dict[str, Any]) -> Answer:
    # Not orjson: entities hold a model's output, which may have integers of any length and half a surrogate pair.
    body = json.dumps(answer, separators=(",", ":")).encode()
    return await call.respond(200, body, {"Content-Type": "application/json"})

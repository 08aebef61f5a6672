"""The composite of crop-describe at the provider: frame left, enlarged detections right, boxes in the frame."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import threading
from io import BytesIO

import pytest
from PIL import Image
from scripted_upstream import CHAT_ANSWER

from sidecar.api.trio import endpoints
from sidecar.api.trio.image import _warn_that_pillow_is_missing

CROP_DESCRIBE = "/api/inference/crop-describe"
PERSON = {"class": "person", "bbox": [100, 100, 200, 300], "confidence": 0.91}
CAR = {"class": "car", "bbox": [400, 200, 600, 340], "confidence": 0.95}


def picture(width: int = 640, height: int = 360, *, exif: int = 0) -> str:
    """Return a black frame with a red person and a green car, in base64."""
    image = Image.new("RGB", (width, height))
    image.paste("red", (100, 100, 200, 300))
    image.paste("lime", (400, 200, 600, 340))
    file = BytesIO()
    if exif:
        tags = Image.Exif()
        tags[0x0112] = exif
        image.transpose(Image.Transpose.ROTATE_90).save(file, "JPEG", quality=95, exif=tags)
    else:
        image.save(file, "JPEG", quality=95)
    return base64.b64encode(file.getvalue()).decode()


#: Created at import, before a test makes Pillow unavailable.
FRAME = picture()


@pytest.fixture
async def sent(serving, scripted):
    """Return a function that calls crop-describe and returns the image and the prompt that the provider got."""
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")

    async def ask(**fields):
        async with sidecar.post({"image_b64": FRAME, **fields}, path=CROP_DESCRIBE) as response:
            assert response.status == 200, await response.text()
        image, text = json.loads(upstream.seen[-1].body)["messages"][0]["content"]
        data = base64.b64decode(image["image_url"]["url"].partition(",")[2])
        return Image.open(BytesIO(data)).convert("RGB"), text["text"]

    return ask


def is_mostly(colour: str, pixel: tuple[int, ...]) -> bool:
    red, green, blue = pixel
    return {"red": red > 150 > max(green, blue), "lime": green > 150 > max(red, blue)}[colour]


async def test_the_frame_is_on_the_left_and_panel_a_shows_the_detection_with_the_highest_confidence(sent):
    image, prompt = await sent(crops=[PERSON, CAR])
    assert image.width == 640 + 213  # a third of the frame's width
    assert image.height == 360
    assert is_mostly("red", image.getpixel((150, 250)))
    assert is_mostly("lime", image.getpixel((500, 300)))
    middle = 640 + 213 // 2
    assert is_mostly("lime", image.getpixel((middle, 110)))
    assert is_mostly("red", image.getpixel((middle, 290)))
    assert "- A: class=car, bbox=[400, 200, 600, 340], confidence=0.95" in prompt
    assert "- B: class=person, bbox=[100, 100, 200, 300], confidence=0.91" in prompt
    assert prompt.index("CROPS:") < prompt.index("SCENE:")


async def test_boxes_are_drawn_in_the_frame_in_the_colour_of_their_panel(sent):
    plain, _ = await sent()
    image, _ = await sent(crops=[PERSON, CAR])
    for corner, box in (((640, 60), (400, 340)), ((640, 240), (100, 300))):  # left edge of a panel, and of its box
        border = image.getpixel((corner[0] + 1, corner[1]))
        drawn = image.getpixel((box[0] + 1, box[1] - 20))
        assert max(abs(a - b) for a, b in zip(border, drawn, strict=True)) < 60
        assert plain.getpixel((box[0] + 1, box[1] - 20)) != drawn


async def test_at_most_max_crops_panels_are_drawn_and_none_without_a_box(sent):
    image, prompt = await sent(crops=[PERSON, CAR, {"class": "cat"}], max_crops=1)
    assert image.width == 640 + 213
    assert "- A: class=car" in prompt
    assert "- B:" not in prompt


async def test_without_panels_the_frame_is_sent_unchanged_with_the_detections_as_hints(sent):
    image, prompt = await sent(crops=[{**PERSON, "track_id": 4}, CAR], max_crops=0)
    assert image.size == (640, 360)
    assert prompt.startswith("YOLO detections")
    assert prompt.index("class=car") < prompt.index("track_id=4, class=person")
    _, own = await sent(crops=[PERSON], max_crops=0, scene_prompt="My own YOLO detections: none")
    assert own == "My own YOLO detections: none"


async def test_without_pillow_crops_are_sent_as_hints_and_the_log_says_once_what_to_install(
    serving, scripted, monkeypatch, caplog
):
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    frame = picture()
    monkeypatch.setitem(sys.modules, "PIL", None)
    _warn_that_pillow_is_missing.cache_clear()
    for _ in range(2):
        async with sidecar.post({"image_b64": frame, "crops": [PERSON]}, path=CROP_DESCRIBE) as response:
            assert response.status == 200
        assert json.loads(upstream.seen[-1].body)["messages"][0]["content"][1]["text"].startswith("YOLO detections")
    assert caplog.text.count("vlm-sidecar[crops]") == 1


async def test_boxes_refer_to_the_upright_frame(sent):
    image, _ = await sent(image_b64=picture(exif=6), crops=[CAR], max_crops=1)
    assert image.height == 360
    assert is_mostly("lime", image.getpixel((500, 300)))
    assert is_mostly("lime", image.getpixel((640 + 213 // 2, 200)))


async def test_a_picture_with_broken_data_is_left_to_the_provider(serving, scripted):
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    broken = base64.b64encode(base64.b64decode(picture())[:300]).decode()
    async with sidecar.post({"image_b64": broken, "crops": [PERSON]}, path=CROP_DESCRIBE) as response:
        assert response.status == 200
    image, text = json.loads(upstream.seen[-1].body)["messages"][0]["content"]
    assert image["image_url"]["url"] == f"data:image/jpeg;base64,{broken}"
    assert text["text"].startswith("YOLO detections")


async def test_the_composite_is_drawn_outside_the_event_loop(serving, scripted, monkeypatch):
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    threads = []

    def recording(*args, compose=endpoints.compose):
        threads.append(threading.current_thread())
        return compose(*args)

    monkeypatch.setattr(endpoints, "compose", recording)
    async with sidecar.post({"image_b64": picture(), "crops": [PERSON]}, path=CROP_DESCRIBE) as response:
        assert response.status == 200
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()


async def test_crop_lines_of_the_answer_become_crop_descriptions(serving, scripted):
    async def script(link, seen):
        text = "CROPS:\nA: a green car, parked\n- B: person: in a red coat\nSCENE: A yard at night.\nNOTABLE: none"
        answer = json.loads(json.dumps(CHAT_ANSWER))
        answer["choices"][0]["message"]["content"] = text
        await link.answer(answer)

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    body = {"image_b64": picture(), "crops": [PERSON, CAR]}
    answers = await asyncio.gather(*(_answer(sidecar, body) for _ in range(5)))
    for answer in answers:
        assert answer["description"] == "A yard at night."
        assert answer["crop_descriptions"] == ["car: a green car, parked", "person: in a red coat"]


async def _answer(sidecar, body):
    async with sidecar.post(body, path=CROP_DESCRIBE) as response:
        return await response.json()

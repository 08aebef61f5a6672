"""`/api/inference/detect` over real sockets, with small real ONNX models whose outputs are known."""

from __future__ import annotations

import asyncio
import base64
from io import BytesIO

import pytest
from PIL import Image
from tiny_onnx import save, yolov10

from sidecar.assembly import StartError

DETECT = "/api/inference/detect"
#: x1, y1, x2, y2 in a frame of 64 x 64 pixels: a person in the left half, and a car below on the right.
PERSON, CAR = (0, 0, 32, 64), (40, 32, 64, 64)


def frame(colour: str = "white", width: int = 640, height: int = 320) -> str:
    jpeg = BytesIO()
    Image.new("RGB", (width, height), colour).save(jpeg, "JPEG")
    return base64.b64encode(jpeg.getvalue()).decode()


def centred(box):
    left, top, right, bottom = box
    return [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]


def rows(scale: float, *, logits: bool = False):
    """Return boxes and scores of three classes for four anchors: a person, a car, and two anchors without an object."""
    low = -9.0 if logits else 0.01
    scores = [[2.0 if logits else 0.9, low, low], [low, low, 1.0 if logits else 0.7], [low] * 3, [low] * 3]
    boxes = [centred(PERSON), centred(CAR), [32, 32, 8, 8], [16, 16, 8, 8]]
    return [[value * scale for value in box] for box in boxes], scores


def model(layout: str, path):
    if layout == "yolov10":
        return yolov10(path, [[*PERSON, 0.9, 0], [*CAR, 0.7, 2], [1, 1, 9, 9, 0.1, 0], [1, 1, 9, 9, 0.99, 60]])
    boxes, scores = rows(1.0 if layout == "yolov8" else 1 / 64, logits=layout == "rtdetr-pair")
    if layout == "rtdetr-pair":
        outputs = {"logits": scores, "pred_boxes": boxes}
    else:
        # The extra rows give more rows than columns, as in real models.
        joined = [[*box, *score] for box, score in zip(boxes, scores, strict=True)] + [[0.0] * 7] * 8
        outputs = {"output0": [list(column) for column in zip(*joined, strict=True)] if layout == "yolov8" else joined}
    return save(path, {name: (rows, [[0.0] * len(rows[0])] * len(rows)) for name, rows in outputs.items()})


@pytest.mark.parametrize("layout", ["yolov10", "yolov8", "rtdetr", "rtdetr-pair"])
async def test_every_model_layout_is_recognised_by_its_outputs(serving, tmp_path, layout):
    sidecar = await serving(backend="simulated", detector_model=str(model(layout, tmp_path / "m.onnx")))
    async with sidecar.post({"image_b64": frame()}, path=DETECT) as response:
        assert response.status == 200, await response.text()
        assert response.headers["X-Sidecar-Backend"] == "detector"
        answer = await response.json()
    assert answer.pop("elapsed_ms") >= 0
    found = answer["crops_b64"]
    # The model gives the same boxes for the whole frame and for each of four tiles. The box of the whole frame must be
    # among the detections.
    whole = {tuple(detection["bbox"]) for detection in found if detection["class"] == "person"}
    assert any(abs(left) <= 1 and abs(right - 320) <= 1 and bottom >= 319 for left, _, right, bottom in whole), found
    assert answer["by_class"].keys() == {"person", "car"}
    assert answer["people_count"] == answer["by_class"]["person"]
    assert answer["vehicle_count"] == answer["by_class"]["car"]
    assert [detection["confidence"] for detection in found] == sorted(
        (detection["confidence"] for detection in found), reverse=True
    )


async def test_the_pixels_of_the_frame_change_the_result(serving, tmp_path):
    path = yolov10(tmp_path / "m.onnx", [[*PERSON, 0.4, 0]])
    sidecar = await serving(backend="simulated", detector_model=str(path))
    for colour, found in (("white", True), ("black", False)):  # scores 0.4 and 0.2; only 0.4 is above the threshold
        async with sidecar.post({"image_b64": frame(colour)}, path=DETECT) as response:
            assert ((await response.json())["people_count"] > 0) is found


async def test_without_a_model_503_names_the_setting_and_status_shows_it(serving, tmp_path):
    sidecar = await serving(backend="simulated")
    async with sidecar.post({"image_b64": frame()}, path=DETECT) as response:
        assert response.status == 503
        assert "SIDECAR_DETECTOR_MODEL" in (await response.json())["detail"]
    async with sidecar.client.get(f"{sidecar.url}/api/inference/status") as response:
        assert (await response.json())["yolo_loaded"] is False
    sidecar = await serving(backend="simulated", detector_model=str(model("yolov10", tmp_path / "m.onnx")))
    async with sidecar.client.get(f"{sidecar.url}/api/inference/status") as response:
        assert (await response.json())["yolo_loaded"] is True


@pytest.mark.parametrize("image", ["AAAA", base64.b64encode(b"\xff\xd8\xff garbage").decode()])
async def test_an_invalid_image_is_400(serving, tmp_path, image):
    sidecar = await serving(backend="simulated", detector_model=str(model("yolov10", tmp_path / "m.onnx")))
    async with sidecar.post({"image_b64": image}, path=DETECT) as response:
        assert response.status == 400
        assert (await response.json())["detail"].startswith("Invalid image data")


async def test_the_detector_has_its_own_queue_and_lock_wait(serving, tmp_path):
    sidecar = await serving(backend="simulated", detector_model=str(model("yolov10", tmp_path / "m.onnx")))

    async def detect() -> int:
        async with sidecar.post({"image_b64": frame()}, path=DETECT) as response:
            return response.status

    assert set(await asyncio.gather(*(detect() for _ in range(20)))) == {200}
    metrics = await sidecar.metrics()
    assert metrics['sidecar_backend_lock_wait_seconds_count{backend="detector"}'] == 20
    assert metrics['sidecar_queue_wait_seconds_count{backend="detector",priority="normal"}'] == 20
    assert metrics['sidecar_queue_requests{backend="detector",priority="normal"}'] == 0


async def test_frames_above_the_queue_bound_are_shed_with_retry_after(serving, tmp_path):
    sidecar = await serving(backend="simulated", detector_model=str(model("yolov10", tmp_path / "m.onnx")))
    detector = sidecar.sidecar.parts.detector
    shed = []

    async def detect():
        async with sidecar.post({"image_b64": frame()}, path=DETECT) as response:
            if response.status == 503:
                shed.append(response.headers["Retry-After"])
            return response.status

    async with asyncio.TaskGroup() as callers, detector._lock:  # simulates a frame that takes long
        tasks = [callers.create_task(detect()) for _ in range(100)]
        await sidecar.until(lambda: len(shed) == 100 - 64 - detector.slots)
    assert [task.result() for task in tasks].count(200) == 64 + detector.slots


@pytest.mark.parametrize("content", ["missing", "garbage", "unknown layout"])
async def test_an_unusable_model_stops_the_start_with_an_error_that_names_the_setting(serving, tmp_path, content):
    path = tmp_path / "m.onnx"
    if content == "garbage":
        path.write_bytes(b"no model")
    elif content == "unknown layout":
        save(path, {"output0": ([[1.0, 2.0]], [[0.0, 0.0]])})
    with pytest.raises(StartError, match=r"SIDECAR_DETECTOR_MODEL=.*m\.onnx"):
        await serving(backend="simulated", detector_model=str(path))

"""Detects people, vehicles and animals in a frame, in this process. The operator provides the ONNX model.

The detector is a normal `Backend`, so that admission queues and limits its requests and measures their waits. It serves
one path and returns the detections as JSON. The extra `detect` installs onnxruntime, numpy and Pillow.
"""

from __future__ import annotations

import asyncio
import binascii
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from backends.base import BackendError, Rejected, Reply, Request, Timings
from backends.picture_memory import PICTURES, PictureTooLarge
from backends.pixels import decode, image_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Detections = tuple[Floats, Floats, NDArray[np.int64]]
    """Corners (N, 4) as x1, y1, x2, y2 in pixels; scores (N); class numbers of COCO (N)."""
    Part = tuple[tuple[int, int, int, int], NDArray[np.uint8]]
    """A box in pixels of the frame, and what it shows, as large as the model's input."""

#: The classes that are reported, by their number in COCO. trio-core reports the same; all other classes are dropped.
CLASSES = {0: "person", 1: "bicycle", 2: "car", 3: "motorcycle", 5: "bus", 7: "truck", 16: "dog", 17: "cat"}
#: Detections with a lower score (0 to 1) are dropped. trio-core uses the same value.
MIN_CONFIDENCE = 0.25
#: If two detections overlap by more than this share of their union, the one with the lower score is dropped. trio-core
#: uses the same value.
MAX_OVERLAP = 0.5
#: The model also runs on tiles of the frame, so that it finds small and distant objects. The frame has this many tiles
#: in each direction. trio-core uses the same number.
_TILES = 2
#: The tiles overlap: each tile is wider and higher by this fraction than the frame's width and height divided by
#: `_TILES`. trio-core uses the same value.
_TILE_OVERLAP = 0.3
#: Pixels. Width and height of the model's input if the model file does not fix them.
_DEFAULT_SIDE = 640


class DetectorBackend:
    """Runs one model on one frame at a time, and decodes the next frame meanwhile.

    What waits for the model is only what the model takes: for an input of 640 x 640 pixels, 6 MB for each request.

    The body of a request is an image in base64.
    """

    name = "detector"
    model_id = None
    has_native_api = False
    slots = 2

    def __init__(self, model: Path) -> None:
        self._path = model
        self._lock = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, "detector")
        self._session: Any = None
        self._input = ""
        self._side = (_DEFAULT_SIDE, _DEFAULT_SIDE)
        self._half = False

    def account(self) -> str:
        """Return the backend's name, because this process uses no account, see `Backend.account`."""
        return self.name

    def unready_reason(self) -> None:
        """Return None: after its start the detector is always ready, see `Backend.unready_reason`."""

    async def start(self) -> None:
        """Load the model and run it once.

        Raises `BackendError` if a package is missing or the model cannot be used. The message says why.
        """
        await asyncio.get_running_loop().run_in_executor(self._thread, self._load)

    async def send(self, request: Request, timings: Timings) -> Reply:
        """Detect objects in one image, see `Backend.send`. Raises `Rejected` if the body is not an image."""
        loop = asyncio.get_running_loop()
        parts = await PICTURES.run(self.name, partial(self._parts, request.body))
        async with self._lock:
            timings.work_started = loop.time()
            detections = await loop.run_in_executor(self._thread, self._detect, parts)
        timings.first_byte = loop.time()
        return Reply(200, {"Content-Type": "application/json"}, orjson.dumps(detections))

    async def models(self) -> bytes:
        """Return a list with the one model, see `Backend.models`."""
        return orjson.dumps({"object": "list", "data": [{"id": self._path.stem, "object": "model"}]})

    async def close(self) -> None:
        """Wait for the running detection and release the model."""
        await asyncio.to_thread(self._thread.shutdown)
        self._session = None

    def _load(self) -> None:
        if not self._path.is_file():  # a pipe would stop the start for ever
            raise BackendError("there is no such file; name an ONNX file that exists")
        try:
            import numpy as np  # noqa: PLC0415
            import onnxruntime  # noqa: PLC0415
        except ImportError as error:
            raise BackendError(f"it needs the extra detect: pip install 'vlm-sidecar[detect]' ({error})") from error
        try:
            options = onnxruntime.SessionOptions()
            # By default its threads spin while they wait for work, and so use the processor time of the event loop.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            session = onnxruntime.InferenceSession(str(self._path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own classes have no common base
            raise BackendError(f"the file is no ONNX model that can be loaded: {error}") from error
        inputs = session.get_inputs()
        shape = inputs[0].shape
        if len(inputs) != 1 or len(shape) != 4 or (isinstance(shape[1], int) and shape[1] != 3):
            shapes = [each.shape for each in inputs]
            raise BackendError(f"the model must take one image, 1 x 3 x height x width, not {shapes}")
        height, width = (side if isinstance(side, int) else _DEFAULT_SIDE for side in shape[2:])
        self._input, self._side, self._half = inputs[0].name, (width, height), inputs[0].type == "tensor(float16)"
        self._session = session
        self._run(np.zeros((1, 3, height, width), np.float32))

    def _parts(self, image_b64: bytes) -> list[Part]:
        """Decode a frame, and return its tiles and the whole, all as large as the model's input.

        So nobody holds the frame while it waits for the model. Raises `Rejected` if the image cannot be decoded.
        """
        import numpy as np  # noqa: PLC0415

        try:
            frame = decode(binascii.a2b_base64(image_b64))
            image = frame.image
            # A tile is scaled first in its width and then in its height.
            PICTURES.hold(image_bytes(*image.size) + image_bytes(self._side[0], image.height + self._side[1]))
        except PictureTooLarge as error:
            raise Rejected(f"the image {error}: send a smaller one", status=400) from error
        except Exception as error:  # Pillow raises almost any exception for a damaged picture
            raise Rejected(f"the image cannot be decoded ({type(error).__name__})", status=400) from error
        across, down = image.width / frame.width, image.height / frame.height
        parts = []
        for box in (*_tiles(frame.width, frame.height), (0, 0, frame.width, frame.height)):
            left, top, right, bottom = box
            within = left * across, top * down, min(right * across, image.width), min(bottom * down, image.height)
            parts.append((box, np.asarray(image.resize(self._side, box=within))))
        return parts

    def _detect(self, parts: list[Part]) -> list[dict[str, Any]]:
        """Run the model on the whole frame and on its tiles, and drop overlapping detections. Returns the JSON."""
        import numpy as np  # noqa: PLC0415

        passes = [self._detect_in(part, box) for box, part in parts]
        boxes, scores, classes = (np.concatenate(arrays) for arrays in zip(*passes, strict=True))
        return [
            {
                "class": CLASSES[int(classes[index])],
                "bbox": [int(corner) for corner in boxes[index]],
                "confidence": round(float(scores[index]), 3),
            }
            for index in _without_overlaps(boxes, scores)
        ]

    def _detect_in(self, part: NDArray[np.uint8], box: tuple[int, int, int, int]) -> Detections:
        """Detect objects in one box of the frame. Both the box and the results are in pixels of the frame."""
        import numpy as np  # noqa: PLC0415

        shares = part.astype(np.float32) / np.float32(255)
        boxes, scores, classes = self._run(shares.transpose(2, 0, 1)[None])
        kept = (scores >= MIN_CONFIDENCE) & np.isin(classes, list(CLASSES))
        left, top, right, bottom = box
        scale = np.array([(right - left) / self._side[0], (bottom - top) / self._side[1]] * 2, np.float32)
        return boxes[kept] * scale + np.array([left, top] * 2, np.float32), scores[kept], classes[kept]

    def _run(self, image: Floats) -> Detections:
        """Run the model once. The corners are in pixels of the model's input.

        Raises `BackendError` if the layout of the outputs is unknown.
        """
        import numpy as np  # noqa: PLC0415

        outputs = self._session.run(None, {self._input: image.astype(np.float16) if self._half else image})
        return _read(outputs, np.array(self._side * 2, np.float32))


def _read(outputs: list[Any], sides: Floats) -> Detections:
    """Recognize the layout of the outputs by their shapes, and return the detections.

    Raises `BackendError` if the layout is none of these:

    * YOLOv10, end to end: N x 6; corners in pixels, score, class
    * YOLOv8 and v11: (4 + classes) x N; centre and size in pixels, then the scores. N is the number of anchors; it is
      larger than 4 + classes
    * RT-DETR of ultralytics: N x (4 + classes); centre and size as shares of the frame, then the scores
    * RT-DETR of transformers: two outputs. N x 4 has centre and size as shares of the frame; N x classes has the logits
    """
    import numpy as np  # noqa: PLC0415

    arrays = [np.asarray(output, np.float32)[0] for output in outputs if np.ndim(output) == 3]
    boxes = next((array for array in arrays if array.shape[1] == 4), None)
    logits = next((array for array in arrays if array.shape[1] != 4), None)
    if boxes is not None and logits is not None and len(boxes) == len(logits):
        return _from_centres(boxes * sides, 1 / (1 + np.exp(-logits)))
    if logits is not None and logits.shape[1] == 6:
        return logits[:, :4], logits[:, 4], logits[:, 5].astype(np.int64)
    if logits is not None and len(logits) > logits.shape[1] > 4:
        return _from_centres(logits[:, :4] * sides, logits[:, 4:])
    if logits is not None and logits.shape[1] > len(logits) > 4:
        return _from_centres(logits[:4].T, logits[4:].T)
    raise BackendError(
        f"the model's outputs {[np.shape(output) for output in outputs]} are none of YOLOv8's, v10's, v11's, RT-DETR's"
    )


def _from_centres(boxes: Floats, scores: Floats) -> Detections:
    """Convert boxes (N, 4) from centre and size to corners, and choose the best class from scores (N, classes)."""
    import numpy as np  # noqa: PLC0415

    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    classes = scores.argmax(axis=1)
    return np.concatenate((centre - half, centre + half), axis=1), scores.max(axis=1), classes


def _without_overlaps(boxes: Floats, scores: Floats) -> list[int]:
    """Return the indices of the boxes to keep, highest score first (non-maximum suppression).

    A box is dropped if it shares more than `MAX_OVERLAP` of the union with a box of a higher score.
    """
    import numpy as np  # noqa: PLC0415

    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    order = scores.argsort()[::-1]
    kept = []
    while len(order):
        first, rest = order[0], order[1:]
        kept.append(int(first))
        shared = np.minimum(boxes[first, 2:], boxes[rest, 2:]) - np.maximum(boxes[first, :2], boxes[rest, :2])
        both = np.prod(np.maximum(shared, 0), axis=1)
        order = rest[both / (areas[first] + areas[rest] - both + 1e-6) < MAX_OVERLAP]
    return kept


def _tiles(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """Return overlapping tiles of a frame as (left, top, right, bottom) in pixels."""
    across, down = width // _TILES, height // _TILES
    tiles = []
    for row in range(_TILES):
        for column in range(_TILES):
            left = max(0, column * across - int(across * _TILE_OVERLAP / 2))
            top = max(0, row * down - int(down * _TILE_OVERLAP / 2))
            right = min(width, left + int(across * (1 + _TILE_OVERLAP)))
            bottom = min(height, top + int(down * (1 + _TILE_OVERLAP)))
            if right > left and bottom > top:
                tiles.append((left, top, right, bottom))
    return tiles

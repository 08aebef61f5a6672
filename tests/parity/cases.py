"""The requests that are sent to both trio-core and the sidecar, and the answers of the provider for each request.

This code creates the same requests on every machine. `expected.json` holds the answers of trio-core 1.1.5
(`make parity` records them). Its keys are the case names, and its digests depend on the class `Says` and its fields.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from PIL import Image

DESCRIBE = "/api/inference/describe"
CROP = "/api/inference/crop-describe"
DETECT = "/api/inference/detect"

#: The intended differences of the sidecar, with the reason. docs/trio-core.md must contain each text word for word.
DIFFERENCES = {
    "bad image": "data that is not an image gets a 400 that names the field; trio-core returns 503",
    "broken image": "an image that is cut off or broken after its first bytes is left to the provider",
    "no reason": "if a provider's refusal has no readable reason, the error says so",
    "not JSON": "a body with a value that is not valid JSON (NaN, half of a surrogate pair) is refused",
    "odd crops": "crops on which trio-core fails (503) are ordered, labelled or left out like all other crops",
    "odd JSON": "an answer whose JSON makes trio-core fail (500, 503) is returned as far as it can be read",
    "stream": "extra_body cannot turn the answer into a stream, on which trio-core fails (503)",
    "throttled": "after a provider's throttling 429 the sidecar waits and tries again; trio-core returns a 422",
    "unreadable": "an answer that is not a chat completion causes a 502 that says so; trio-core returns 503",
    "upstream failed": "a provider that fails causes a 502; only the sidecar itself returns 503, with Retry-After",
}


def image(kind: str = "JPEG", width: int = 64, height: int = 48) -> bytes:
    """Return a small picture."""
    file = BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(file, kind)
    return file.getvalue()


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


FRAME = encoded(image())
WIDE = encoded(image(width=640, height=360))


@dataclass(frozen=True)
class Says:
    """One answer of the provider."""

    status: int = 200
    body: bytes = b""
    content_type: str = "application/json"


def saying(text: str | None) -> Says:
    message = {"role": "assistant", "content": text}
    answer = {
        "id": "c", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }  # fmt: skip
    return Says(body=json.dumps(answer).encode())


def refusing(status: int, code: str, message: str) -> Says:
    error = {"message": message, "type": code, "param": None, "code": code}
    return Says(status, json.dumps({"error": error, "request_id": "r"}).encode())


@dataclass(frozen=True)
class Case:
    name: str
    path: str
    body: bytes
    says: tuple[Says, ...] = field(default_factory=lambda: (saying("A gate."),))
    content_type: str = "application/json"
    method: str = "POST"
    differs: str = ""
    status: int = 0
    """The sidecar's status, if `differs` is not empty."""

    @property
    def digest(self) -> str:
        whole = repr((self.path, self.body, self.says, self.content_type, self.method))
        return hashlib.sha256(whole.encode()).hexdigest()[:16]

    @property
    def own_prompt(self) -> str:
        try:
            asked = json.loads(self.body)
            prompt = asked.get("prompt") or asked.get("scene_prompt")
        except (ValueError, AttributeError):
            return ""
        return prompt if isinstance(prompt, str) else ""


def all_cases() -> list[Case]:
    """Return all cases. Each has a unique name."""
    cases = [*_fields(), *_bodies(), *_images(), *_texts(), *_scenes(), *_crops(), *_detections(), *_failures()]
    assert len({case.name for case in cases}) == len(cases)
    return cases


def _json(**fields: Any) -> bytes:
    return json.dumps({"image_b64": FRAME, **fields}).encode()


_DIFFERENT_FIELDS = {
    ("describe", "extra_body", 4): ("stream", 200),
    ("crop", "extra_body", 4): ("stream", 200),
    ("detect", "pad_ratio", 6): ("not JSON", 422),
}


def _fields() -> list[Case]:
    """Return cases for every field: at, below and above its bounds, and with every wrong type."""
    shared: dict[str, list[Any]] = {
        "response_format": [None, {}, {"type": "json_object"}, [], "x", 5],
        "max_tokens": [0, 1, 16384, 16385, -1, 2.0, 1.5, "5", "x", True, None, [], 10**30],
        "model": ["", "m" * 128, "m" * 129, 5, None, "qwen-vl-max"],
        "extra_body": [
            {}, {"enable_thinking": False}, {"model": "other", "max_tokens": 7}, {"temperature": 0.7, "n": 2**70},
            {"stream": True}, [], "x", None,
        ],
        "image_b64": [None, 5, [], {}, True],
        "unknown_field": [1],
    }  # fmt: skip
    of: dict[str, tuple[str, dict[str, list[Any]]]] = {
        "describe": (DESCRIBE, {**shared, "prompt": [None, 5, "", "x" * 4096, "x" * 4097, "Ö 是什么? 🚗", ["a"]]}),
        "crop": (
            CROP,
            {
                **shared,
                "crops": [[], None, {}, [5], ["a", {}], [{}] * 50, [{}] * 51, "x"],
                "max_crops": [0, 1, 20, 21, -1, "3", 2.0, 2.5, None, True],
                "scene_prompt": ["", None, 5, "y" * 32768, "y" * 32769, "Anything?"],
            },
        ),
        "detect": (DETECT, {"image_b64": shared["image_b64"], "pad_ratio": [-0.1, 1.1, "x", None, [], "nan", 1e999]}),
    }
    made = []
    for name, (path, fields) in of.items():
        made.append(Case(f"{name} nothing", path, b"{}"))
        made.append(Case(f"{name} two wrong", path, b'{"max_tokens": 0, "pad_ratio": 2, "model": 1}'))
        for key, values in fields.items():
            for index, value in enumerate(values):
                reason, status = _DIFFERENT_FIELDS.get((name, key, index), ("", 0))
                body = _json(**{key: value})
                made.append(Case(f"{name} {key} {index}", path, body, differs=reason, status=status))
    return made


def _bodies() -> list[Case]:
    """Return cases whose body is not a valid request."""
    frame = FRAME.encode()
    bodies = {
        "empty": b"", "null": b"null", "list": b"[]", "text": b'"x"', "number": b"5", "true": b"true",
        "brace": b"{", "open text": b'{"a": "', "quotes": b"{'a': 1}", "garbage": b"\x00\x01",
        "two": b"{} {}", "bom": b"\xef\xbb\xbf{}", "latin": b'{"image_b64": "\xe9"}', "control": b'{"a": "\n"}',
        "deep": b"[" * 100_000, "twice": b'{"image_b64": 5, "image_b64": "' + frame + b'"}',
        "nested key": b'{"extra_body": {"image_b64": "' + frame + b'"}}', "escaped": b'{"image\\u005fb64": 7}',
    }  # fmt: skip
    made = [Case(f"body {name}", DESCRIBE, body) for name, body in bodies.items()]
    for kind in ("", "text/plain", "application/xml", "application/problem+json", "Application/JSON; charset=utf-8"):
        made.append(Case(f"type {kind!r}", DESCRIBE, _json(), content_type=kind))
        made.append(Case(f"type {kind!r}, wrong", DESCRIBE, b'{"image_b64": 5}', content_type=kind))
    made.append(Case("body NaN", DESCRIBE, _json(extra_body={"x": float("nan")}), differs="not JSON", status=400))
    made.append(Case("body half a character", DESCRIBE, _json(prompt="\ud800"), differs="not JSON", status=422))
    return made


def _images() -> list[Case]:
    """Return cases for images of every format, and for invalid images."""
    jpeg = image()
    made = []
    for kind in ("JPEG", "PNG", "WEBP", "BMP"):
        made.append(Case(f"image {kind}", DESCRIBE, _json(image_b64=encoded(image(kind)))))
        made.append(Case(f"image {kind}, crop", CROP, _json(image_b64=encoded(image(kind)))))
    lines = "\n".join(FRAME[at : at + 76] for at in range(0, len(FRAME), 76))
    made.append(Case("image in lines", DESCRIBE, _json(image_b64=lines)))
    made.append(Case("image with spaces", DESCRIBE, _json(image_b64=FRAME[:40] + "  " + FRAME[40:])))
    none = {
        "empty": "", "one": "A", "short": "AAAA", "padding": FRAME[:41], "html": encoded(b"<html></html>"),
        "url": "data:image/jpeg;base64," + FRAME, "foreign": "ÄÖ",
    }  # fmt: skip
    for name, text in none.items():
        body = _json(image_b64=text)
        made += [
            Case(f"no image {name} {path[15:]}", path, body, differs="bad image", status=400)
            for path in (DESCRIBE, CROP)
        ]
    for name, data in (("cut off", jpeg[: len(jpeg) // 2]), ("broken", jpeg[:20] + b"\0" * 50)):
        body = _json(image_b64=encoded(data))
        made.append(Case(f"image {name}", DESCRIBE, body, differs="broken image", status=200))
    return made


def _texts() -> list[Case]:
    """Return cases for the possible answers of a model to describe."""
    texts = [
        None, "", "  \n", "Plain.", " spaces around ", "<think>a</think>B", "<think>a</think> <think>b</think> C",
        "<think>never closed", "before <think>never closed", "closed only</think> after", "a</think> b <think> c",
        "<think>\nlines\n</think>\n\nD", "<think><think>a</think>b</think>c", "<THINK>x</THINK>", "是 🚗 é",
        "x" * 5000, "<think></think>", '{"a": 1}', "line\nline",
    ]  # fmt: skip
    return [Case(f"text {index}", DESCRIBE, _json(), (saying(text),)) for index, text in enumerate(texts)]


_SCENES = (
    "SCENE: A gate.\nACTIVITIES: A man walks.\nNOTABLE: nothing unusual\nJSON: {\"people_count\": 1}",
    "SCENE: A gate.\nNOTABLE: A bag was left.", "DESCRIPTION: A yard.\nJSON: {\"persons\": [\"a guard\"]}",
    "SCENE:\nACTIVITIES: none", "ACTIVITIES: only these", "scene: lower case", "SCENE: one\nSCENE: two",
    "NOTABLE: x\nSCENE: late\nACTIVITIES: y", "SCENE: a JSON: b ACTIVITIES: c", "SCENE: a\nNOTABLE: None",
    "SCENE: a\nNOTABLE: N/A", "SCENE: a\nNOTABLE: Nothing unusual.",
    '```json\n{"summary": "Busy street", "persons": []}\n```', '```\n{"SCENE": "from json"}\n```', "```json```", "```",
    '{"DESCRIPTION": "from json", "mood": "calm"}', '{"summary": ""}', '{"summary": 5}', "{}", '{"persons": null}',
    '{"persons": ["guard", {"action": "runs"}, {"attire": "coat"}, {}], "people_count": 4}',
    '{"vehicles": [{"color": "red", "make": "VW", "action": "parks"}, {"type": "van"}, "taxi"], "vehicle_count": 3}',
    '{"vehicles": "one van", "animals": "dog", "persons": "boy"}', '{"persons": [1, 2.5, true]}',
    '{"animals": [{"breed": "pug"}]}', '{"vehicles": [{"brand": "Kia"}, {"make": "BMW"}, {"description": "d"}]}',
    '{"people_count": 3, "vehicle_count": "two"}', '{"people_count": 3', '{"a": {"b": 1}', '{"a": 1}}', "a { b } c",
    '{"persons": [{"action": "a"}, {"action": "b"}, {"action": "c"}, {"action": "d"}, {"action": "e"}, {"action": "f"}]}',
    "[1, 2]", '[{"persons": []}]', "Bustling crowd in Times Square", "An empty parking lot, quiet", "calm street",
    "an alarming plaza", "steady traffic at the intersection, active", "a park", "x" * 400, "", "   ",
    "<think>{\"a\": 1}</think>SCENE: after", "<think>open {\"people_count\": 2}", '{"x": 1e400}', '{"x": NaN}',
    '{"x": 12345678901234567890123}', '{"text": "\\ud83d"}', '{"SCENE": {"a": 1}}', '{"DESCRIPTION": null}',
    '{"SCENE": ""}', '{"persons": [{"action": null}]}', '{"persons": [{"action": 5}]}', '{"persons": {"action": "x"}}',
    'noise {"summary": "inside"} noise', "SCENE: ```json\n{\"people_count\": 2}\n```", '"just text"', "null",
)  # fmt: skip

_DIFFERENT_SCENES = {
    '{"persons": [{"action": null}]}': ("odd JSON", 200),
    '{"persons": [{"action": 5}]}': ("odd JSON", 200),
    '{"SCENE": {"a": 1}}': ("odd JSON", 200),
    '{"DESCRIPTION": null}': ("odd JSON", 200),
    '{"text": "\\ud83d"}': ("odd JSON", 200),
}


def _scenes() -> list[Case]:
    """Return cases for answers of every format to crop-describe, and for random combinations of their parts."""
    chance = random.Random(6)
    pieces = (
        "SCENE: A gate at night.", "ACTIVITIES: Two men talk.", "NOTABLE: A bag.", "NOTABLE: none", "DESCRIPTION: D.",
        'JSON: {"people_count": 2, "persons": [{"action": "talk"}]}', "```json", "```", "{", "}", "<think>", "</think>",
        "CROPS:", "A: person: in red", "plain words", "", "SCENE:", "JSON:",
    )  # fmt: skip
    mixed = ["\n".join(chance.choices(pieces, k=chance.randint(2, 7))) for _ in range(60)]
    made = []
    for index, text in enumerate((*_SCENES, *dict.fromkeys(mixed))):
        reason, status = _DIFFERENT_SCENES.get(text, ("", 0))
        made.append(Case(f"scene {index}", CROP, _json(), (saying(text),), differs=reason, status=status))
    return made


def _crops() -> list[Case]:
    """Return cases for detections of every kind. The answer names its panels in every accepted spelling."""
    text = (
        "CROPS:\nA: person: in red\n- B: a van\n* C) truck: big\n D . dog\nE - cat\nF:\nSCENE: A yard.\nNOTABLE: none"
    )
    box = [10, 10, 200, 200]
    crops: dict[str, list[Any]] = {
        "one": [{"class": "person", "bbox": box, "confidence": 0.9}],
        "xyxy and label": [{"label": "van", "xyxy": [300, 50, 600, 300], "confidence": 0.5}],
        "by confidence": [
            {"class": "car", "bbox": box, "confidence": 0.2}, {"class": "bus", "bbox": box, "confidence": 0.8},
            {"class": "dog", "bbox": box},
        ],
        "no class": [{"bbox": box}], "floats": [{"class": "person", "bbox": [1.9, 2.9, 90.1, 90.9]}],
        "texts": [{"class": "person", "bbox": ["1", "2", "90", "95"]}], "outside": [{"class": "x", "bbox": [700, 400, 900, 500]}],
        "partly": [{"class": "x", "bbox": [600, 300, 900, 500]}], "negative": [{"class": "x", "bbox": [-50, -50, 90, 90]}],
        "turned": [{"class": "x", "bbox": [200, 200, 10, 10]}], "tiny": [{"class": "x", "bbox": [5, 5, 8, 8]}],
        "three": [{"class": "x", "bbox": [1, 2, 3]}], "null box": [{"class": "x", "bbox": None}],
        "words": [{"class": "x", "bbox": ["a", "b", "c", "d"]}], "empty": [{}],
        "many": [{"class": f"c{i}", "bbox": [i * 10, 10, i * 10 + 60, 200], "confidence": i / 10} for i in range(9)],
        "tracked": [{"class": "x", "bbox": box, "track_id": 7, "confidence": 1}],
        "person in front": [{"class": "Person", "bbox": box}], "class is a number": [{"class": 5, "bbox": box}],
        "confidence null": [{"class": "a", "bbox": box, "confidence": None}],
        "confidences mixed": [
            {"class": "a", "bbox": box, "confidence": None}, {"class": "b", "bbox": box, "confidence": 0.5},
        ],
        "confidence text": [{"class": "a", "bbox": box, "confidence": "0.5"}],
    }  # fmt: skip
    different = {"confidences mixed": ("odd crops", 200)}
    made = []
    for name, listed in crops.items():
        for most in (0, 3, 20):
            reason, status = different.get(name, ("", 0))
            if name == "words":
                reason, status = "odd crops", 200
            body = _json(image_b64=WIDE, crops=listed, max_crops=most, scene_prompt="What goes on?")
            made.append(Case(f"crops {name} {most}", CROP, body, (saying(text),), differs=reason, status=status))
    return made


#: The test detector's result for every frame and tile: rows of x1, y1, x2, y2, score, class on 64 x 64 pixels.
DETECTOR_ROWS = (
    (4, 4, 24, 60, 0.9, 0), (28, 8, 60, 30, 0.7, 2), (30, 36, 62, 62, 0.6, 7), (5, 5, 24, 60, 0.5, 0),
    (1, 40, 20, 62, 0.45, 16), (10, 10, 12, 12, 0.2, 1), (0, 0, 64, 64, 0.99, 60), (-3, -2, 9, 9, 0.8, 3),
)  # fmt: skip


def _detections() -> list[Case]:
    """Return cases for the detector. Each frame has one colour, because trio-core and the sidecar scale differently."""
    made = []
    for colour in ("white", "black", "grey"):
        for size in ((64, 64), (640, 360), (333, 500)):
            file = BytesIO()
            Image.new("RGB", size, colour).save(file, "PNG")
            body = json.dumps({"image_b64": encoded(file.getvalue()), "pad_ratio": size[0] / 1000}).encode()
            made.append(Case(f"detect {colour} {size[0]}", DETECT, body))
    made.append(
        Case("detect no image", DETECT, _json(image_b64=encoded(b"<html></html>")), differs="bad image", status=400)
    )
    return made


def _failures() -> list[Case]:
    """Return cases in which the provider refuses or fails.

    Each case has its own model, because the sidecar tracks failures per model.
    """
    moderated = refusing(400, "data_inspection_failed", "Input data may contain inappropriate content.")
    failures: dict[str, tuple[tuple[Says, ...], str, int]] = {
        "moderated": ((moderated,), "", 0),
        "moderated output": ((refusing(400, "data_inspection_failed", "Output data may be bad."),), "", 0),
        "bad parameter": ((refusing(400, "invalid_parameter_error", "max_tokens is too large"),), "", 0),
        "no model": ((refusing(404, "model_not_found", "The model does not exist"),), "", 0),
        "too large": ((refusing(413, "request_too_large", "Too large"),), "", 0),
        "unprocessable": ((refusing(422, "invalid", "No"),), "", 0),
        "key": ((refusing(401, "invalid_api_key", "Incorrect API key"),), "", 0),
        "denied": ((refusing(403, "access_denied", "Denied"),), "", 0),
        "plain 400": ((Says(400, b"no JSON here", "text/plain"),), "no reason", 422),
        "empty 400": ((Says(400, b""),), "no reason", 422),
        "long 400": ((refusing(400, "x", "m" * 150),), "", 0),
        "throttled once": ((refusing(429, "limit_requests", "slow down"), saying("Then.")), "", 0),
        "throttled": ((*[refusing(429, "limit_requests", "slow down")] * 3, saying("Then.")), "throttled", 200),
        "failed once": ((refusing(500, "internal_error", "oops"), saying("Then.")), "", 0),
        "failed": ((refusing(500, "internal_error", "oops"),), "upstream failed", 502),
        "html": ((Says(200, b"<html></html>", "text/html"),), "unreadable", 502),
        "no choices": ((Says(200, b'{"id": "c"}'),), "unreadable", 502),
    }
    made = []
    for name, (says, reason, status) in failures.items():
        for path in (DESCRIBE, CROP):
            body = _json(model=f"failing {name} {path[15:]}")
            made.append(Case(f"{name} {path[15:]}", path, body, says, differs=reason, status=status))
    return made

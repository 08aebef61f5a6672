"""Choose which detections of a crop-describe request become zoom panels, and build the prompt about them.

Pure functions without pixels (`trio/image.py` draws the panels) and without HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

JsonObject = dict[str, Any]
Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels of the upright frame."""

#: Share of the box's own width and height that is added on each side of a crop. Source: trio-core 1.1.5.
CROP_PADDING = 0.15
#: Pixels. A crop whose shorter side is below this is not shown. Source: trio-core 1.1.5.
CROP_MIN_PIXELS = 8
_LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MAX_HINTS = 8
#: Pixels. No box is that far away; arithmetic with integers of hundreds of digits would fail.
_MAX_COORDINATE = 1 << 31

#: First words of the hint. If the caller's own prompt contains them, it already has a hint and gets no second hint.
_HINT_MARK = "YOLO detections"

#: The section marks are those of trio-core's prompt, because the answer is parsed by them. The wording is our own.
_SCENE_PROMPT = """\
You watch one frame of a surveillance camera for people who cannot see it. Work out what is going on, rather than \
listing things: the situation as a whole, what each person and vehicle is doing and where to, who belongs or reacts to \
whom, and whatever a guard would want to be told. Name what identifies people, vehicles and animals (clothes and \
build, kind, make and colour, breed), and leave out what cannot be made out.

Answer with exactly these lines, each mark at the start of its line:
SCENE: the situation in one sentence
ACTIVITIES: what is being done and how those in it relate, in two or three sentences on this one line
NOTABLE: what is out of the ordinary or worth following up; if there is none, nothing unusual
JSON: {"people_count": 0, "vehicle_count": 0, \
"persons": [{"appearance": "", "action": "", "location": ""}], \
"vehicles": [{"type": "", "color": "", "make": "", "action": ""}], \
"scene_type": "", "activity_level": "quiet, moderate or busy", "mood": "calm, tense or active"}"""


@dataclass(frozen=True, slots=True)
class Panel:
    """One detection that is shown enlarged next to the frame."""

    label: str
    kind: str
    box: Box
    confidence: float | None


def choose_panels(crops: Sequence[JsonObject], width: int, height: int, max_panels: int) -> list[Panel]:
    """Return up to `max_panels` detections with the highest confidence whose box is visible in a frame of that size.

    They are labelled A, B, C, … in this order.
    """
    panels: list[Panel] = []
    for crop in _by_confidence(crops):
        if len(panels) >= min(max_panels, len(_LABELS)):
            break
        box = _box(crop)
        if box is None or box[2] <= box[0] or box[3] <= box[1]:
            continue
        left, top, right, bottom = padded(box, width, height, CROP_PADDING)
        if min(right - left, bottom - top) >= CROP_MIN_PIXELS:
            panels.append(Panel(_LABELS[len(panels)], _kind(crop), box, _confidence(crop)))
    return panels


def padded(box: Box, width: int, height: int, share: float) -> Box:
    """Return the box, enlarged on each side by `share` of its width or height, and clipped to the frame.

    The result is empty if the box is outside the frame.
    """
    left, top, right, bottom = box
    grow_x, grow_y = int((right - left) * share), int((bottom - top) * share)
    return max(0, left - grow_x), max(0, top - grow_y), min(width, right + grow_x), min(height, bottom + grow_y)


def scene_prompt(own: str, crops: Sequence[JsonObject], panels: Sequence[Panel]) -> str:
    """Return the prompt for a frame: a text about the panels or detections, then the caller's `own` prompt or ours."""
    prompt = own or _SCENE_PROMPT
    if panels:
        return f"{_panels_prompt(panels)}\n\n{prompt}"
    hint = "" if _HINT_MARK in prompt else _detections_hint(crops)
    return f"{hint}\n\n{prompt}" if hint else prompt


def _panels_prompt(panels: Sequence[Panel]) -> str:
    listed = "\n".join(
        f"- {panel.label}: class={panel.kind}, bbox={list(panel.box)}{_confidence_suffix(panel.confidence)}"
        for panel in panels
    )
    wanted = "\n".join(f"{panel.label}: {panel.kind}: [a few words on how it looks]" for panel in panels)
    return (
        "This picture is put together of two parts. Left is the whole camera frame, with labelled boxes drawn in; "
        "right of it, one below the other, each box is enlarged under the same label. Look at the enlargements to see "
        "what something looks like, and at the frame to see where it is and what it does.\n"
        f"Enlarged:\n{listed}\n\n"
        f"Begin the answer with one line for each of them, before SCENE, in just this form:\nCROPS:\n{wanted}"
    )


def _detections_hint(crops: Sequence[JsonObject]) -> str:
    """Return a text that lists the detections with the highest confidence, or "" if no detection has a box."""
    lines = []
    for crop in _by_confidence(crops)[:_MAX_HINTS]:
        box = _box(crop)
        if box is not None:
            track = crop.get("track_id")
            tracked = "" if track is None else f"track_id={track}, "
            lines.append(f"- {tracked}class={_kind(crop)}, bbox={list(box)}{_confidence_suffix(_confidence(crop))}")
    if not lines:
        return ""
    return f"{_HINT_MARK}, which may be wrong: check each against the picture.\n" + "\n".join(lines)


def _by_confidence(crops: Sequence[JsonObject]) -> list[JsonObject]:
    return sorted(crops, key=lambda crop: _confidence(crop) or 0.0, reverse=True)


def _box(crop: JsonObject) -> Box | None:
    corners = crop.get("bbox") or crop.get("xyxy")
    if not isinstance(corners, list) or len(corners) != 4:
        return None
    try:
        left, top, right, bottom = (int(corner) for corner in corners)
    except (TypeError, ValueError, OverflowError):  # another type, NaN, or infinity
        return None
    if max(map(abs, (left, top, right, bottom))) > _MAX_COORDINATE:
        return None
    return left, top, right, bottom


def _kind(crop: JsonObject) -> str:
    return str(crop.get("class") or crop.get("label") or "object")


def _confidence(crop: JsonObject) -> float | None:
    value = crop.get("confidence")
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def _confidence_suffix(confidence: float | None) -> str:
    return "" if confidence is None else f", confidence={confidence:.2f}"

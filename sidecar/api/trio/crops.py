"""The detections a crop-describe request brings: which become zoom panels, and what the model is told of them.

Pure: no pixels here (`trio_image` draws the panels), and no HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

JsonObject = dict[str, Any]
Box = tuple[int, int, int, int]
"""x1, y1, x2, y2 in pixels of the upright frame."""

#: A crop is cut this share of its sides wider all around, and not shown when it is smaller than this: trio-core's.
CROP_PADDING = 0.15
CROP_MIN_PIXELS = 8
_LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MAX_HINTS = 8

#: Opens the hint, and tells one in a caller's own prompt: no second is added then.
_HINT_MARK = "YOLO detections"

#: The same section marks as trio-core's prompt, since they are what the answer is read by; the words are our own.
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
    """One detection that is shown enlarged beside the frame."""

    label: str
    kind: str
    box: Box
    confidence: float | None


def choose_panels(crops: Sequence[JsonObject], width: int, height: int, most: int) -> list[Panel]:
    """The `most` surest detections whose box can be shown in a frame of that size, labelled A, B, C, … in turn."""
    panels: list[Panel] = []
    for crop in _surest_first(crops):
        if len(panels) >= min(most, len(_LABELS)):
            break
        box = _box(crop)
        if box is None or box[2] <= box[0] or box[3] <= box[1]:
            continue
        left, top, right, bottom = padded(box, width, height, CROP_PADDING)
        if min(right - left, bottom - top) >= CROP_MIN_PIXELS:
            panels.append(Panel(_LABELS[len(panels)], _kind(crop), box, _confidence(crop)))
    return panels


def padded(box: Box, width: int, height: int, share: float) -> Box:
    """The box grown by a share of its own sides on every side, within the frame. Empty when it lies outside."""
    left, top, right, bottom = box
    grow_x, grow_y = int((right - left) * share), int((bottom - top) * share)
    return max(0, left - grow_x), max(0, top - grow_y), min(width, right + grow_x), min(height, bottom + grow_y)


def scene_prompt(own: str, crops: Sequence[JsonObject], panels: Sequence[Panel]) -> str:
    """The prompt for a frame: the caller's `own` or ours, after what there is to say of panels or detections."""
    prompt = own or _SCENE_PROMPT
    if panels:
        return f"{_about_panels(panels)}\n\n{prompt}"
    hint = "" if _HINT_MARK in prompt else _about_detections(crops)
    return f"{hint}\n\n{prompt}" if hint else prompt


def _about_panels(panels: Sequence[Panel]) -> str:
    listed = "\n".join(
        f"- {panel.label}: class={panel.kind}, bbox={list(panel.box)}{_sure(panel.confidence)}" for panel in panels
    )
    wanted = "\n".join(f"{panel.label}: {panel.kind}: [a few words on how it looks]" for panel in panels)
    return (
        "This picture is put together of two parts. Left is the whole camera frame, with labelled boxes drawn in; "
        "right of it, one below the other, each box is enlarged under the same label. Look at the enlargements to see "
        "what something looks like, and at the frame to see where it is and what it does.\n"
        f"Enlarged:\n{listed}\n\n"
        f"Begin the answer with one line for each of them, before SCENE, in just this form:\nCROPS:\n{wanted}"
    )


def _about_detections(crops: Sequence[JsonObject]) -> str:
    """The surest detections as hints in words; empty when none has a box."""
    lines = []
    for crop in _surest_first(crops)[:_MAX_HINTS]:
        box = _box(crop)
        if box is not None:
            track = crop.get("track_id")
            tracked = "" if track is None else f"track_id={track}, "
            lines.append(f"- {tracked}class={_kind(crop)}, bbox={list(box)}{_sure(_confidence(crop))}")
    if not lines:
        return ""
    return f"{_HINT_MARK}, which may be wrong: check each against the picture.\n" + "\n".join(lines)


def _surest_first(crops: Sequence[JsonObject]) -> list[JsonObject]:
    return sorted(crops, key=lambda crop: _confidence(crop) or 0.0, reverse=True)


def _box(crop: JsonObject) -> Box | None:
    corners = crop.get("bbox") or crop.get("xyxy")
    if not isinstance(corners, list) or len(corners) != 4:
        return None
    try:
        left, top, right, bottom = (int(corner) for corner in corners)
    except (TypeError, ValueError, OverflowError):  # what is no number, not a number, or infinite
        return None
    return left, top, right, bottom


def _kind(crop: JsonObject) -> str:
    return str(crop.get("class") or crop.get("label") or "object")


def _confidence(crop: JsonObject) -> float | None:
    value = crop.get("confidence")
    return float(value) if isinstance(value, int | float) else None


def _sure(confidence: float | None) -> str:
    return "" if confidence is None else f", confidence={confidence:.2f}"

"""Reads a model's answer the way trio-core's callers expect: out of free text, sections, or JSON in any state.

Pure functions over text. Their quirks are trio-core 1.1.5's, measured by `tests/parity`: cortex stores what comes out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

JsonObject = dict[str, Any]

_CLOSED_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)

#: The parts of a described scene in the order in which they are looked for; DESCRIPTION takes SCENE's place.
_SECTIONS = ("SCENE:", "ACTIVITIES:", "NOTABLE:", "DESCRIPTION:")
#: What ends a section. The first of these *in this order* that occurs later does, wherever it stands.
_SECTION_ENDS = ("SCENE:", "ACTIVITIES:", "NOTABLE:", "JSON:", "```")
_NOTHING_NOTABLE = frozenset({"nothing unusual", "nothing unusual.", "none", "n/a"})

#: Entities guessed from a description that came without any: field, then value and words in order of precedence.
_GUESSES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "activity_level": (
        ("busy", ("bustling", "crowded", "busy", "packed", "dense")),
        ("moderate", ("moderate", "steady", "normal")),
        ("quiet", ("quiet", "empty", "calm", "sparse", "deserted")),
    ),
    "scene_type": (
        ("Times Square plaza", ("times square", "new york", "nyc")),
        ("parking lot", ("parking", "lot")),
        ("urban street", ("intersection", "crosswalk", "street")),
        ("public plaza", ("plaza", "square", "park")),
    ),
    "mood": (
        ("tense", ("tense", "aggressive", "alarming")),
        ("active", ("active", "energetic", "bustling")),
        ("calm", ("",)),  # of every text
    ),
}

_PLAIN_TEXT_CHARACTERS = 300
_MAX_NAMED_IN_A_SUMMARY = 5


def strip_thinking(text: str) -> str:
    """The answer without the model's thinking: closed `<think>` blocks, and one that was opened and never closed."""
    text = _CLOSED_THINKING.sub("", text).strip()
    if "<think>" not in text:
        return text
    _, closed, after = text.rpartition("</think>")
    # A close that stands before the open: what follows it is kept as it is.
    return after.strip() if closed else text.partition("<think>")[0].strip()


def crop_descriptions(text: str, panels: Iterable[tuple[str, str]]) -> list[str]:
    """What the answer says of each zoom panel, given as label and class; a panel without a line is left out.

    A line is `A: ...`, also with a dash or star before, or `.`, `)` or `-` after the label; the class is put in front
    unless the model did so.
    """
    lines = [line.strip() for line in text.splitlines()]
    described = []
    for label, kind in panels:
        line_of_panel = re.compile(rf"(?:[-*]\s*)?{re.escape(label)}\s*[:.)-]\s*(.+)")
        phrase = next((match[1].strip() for line in lines if (match := line_of_panel.fullmatch(line))), "")
        if phrase:
            named = phrase.lower().startswith(f"{kind.lower()}:")
            described.append(phrase if named else f"{kind}: {phrase}")
    return described


def describe_scene(text: str) -> tuple[str, JsonObject]:
    """Description and entities out of a scene answer whose thinking is already stripped.

    The description is assembled from the sections; without them it comes from the JSON; without that it is the text's
    beginning. JSON that is broken or cut off gives no description rather than garbage. Entities are never empty:
    without JSON they are guessed from the description's words.
    """
    plain = _without_fence(text)
    entities, broken = _find_json(plain)
    description = _from_sections(text)
    if not description and entities:
        description = _from_entities(entities)
    elif not description and not broken:
        description = plain[:_PLAIN_TEXT_CHARACTERS]
    return description, entities or _guess_entities(description)


def _without_fence(text: str) -> str:
    """The inside of a Markdown code block, if the text begins or ends as one."""
    text = text.strip()
    if text.startswith("```"):
        text = text.partition("\n")[2] if "\n" in text else text[3:]
    if text.endswith("```"):
        text = text[:-3]
    return text.strip()


def _find_json(text: str) -> tuple[JsonObject, bool]:
    """The normalised object between the first and the last brace, or nothing, and whether there was a broken one."""
    start, end = text.find("{"), text.rfind("}")
    if not 0 <= start < end:
        return {}, text.startswith("{")
    try:
        parsed = json.loads(text[start : end + 1], parse_float=_finite, parse_constant=lambda _: None)
        return normalise_entities(parsed), False
    except (ValueError, RecursionError):
        return {}, True


def _finite(number: str) -> float | None:
    value = float(number)
    return value if math.isfinite(value) else None


def normalise_entities(entities: Mapping[str, Any]) -> JsonObject:
    """Persons, vehicles and animals as lists of objects, whatever the model made of them; the rest untouched."""
    normal = dict(entities)
    for kind in ("persons", "vehicles", "animals"):
        items = normal.get(kind) or []
        normal[kind] = [_normalise_entity(kind, item) for item in (items if isinstance(items, list) else [items])]
    return normal


def _normalise_entity(kind: str, item: object) -> JsonObject:
    if isinstance(item, dict):
        entity = dict(item)
    else:
        text = str(item).strip()
        entity = {"description": text}
        match kind:
            case "vehicles":
                entity |= {"make": text, "brand": text}
            case "persons":
                entity |= {"attire": text, "role": "unknown"}
            case _:
                entity |= {"breed": text}
    if kind == "vehicles":
        name = entity.get("brand") or entity.get("make") or entity.get("description", "")
        entity.setdefault("brand", name)
        entity.setdefault("make", name)
    return entity


def _from_sections(text: str) -> str:
    found: dict[str, str] = {}
    for section in _SECTIONS:
        _, present, rest = text.partition(section)
        if present:
            end = next((end for end in _SECTION_ENDS if end != section and end in rest), None)
            if end is not None:
                rest = rest.partition(end)[0]
            found[section] = rest.strip().partition("\n")[0].strip()
    scene = found.get("DESCRIPTION:", found.get("SCENE:", ""))
    if not scene:
        return ""
    notable = found.get("NOTABLE:", "")
    if notable.lower() in _NOTHING_NOTABLE:
        notable = ""
    return " ".join(part for part in (scene, found.get("ACTIVITIES:", ""), notable) if part)


def _from_entities(entities: JsonObject) -> str:
    """A description out of the JSON alone. DESCRIPTION and SCENE are moved out of it, a summary is left in."""
    for key in ("DESCRIPTION", "SCENE"):
        if isinstance(entities.get(key), str):
            return str(entities.pop(key))
    summary = entities.get("summary")
    if isinstance(summary, str) and summary:
        return summary
    doing = [person.get("action", person.get("attire")) for person in entities["persons"]]
    named = ["person" if what is None else str(what) for what in doing]
    named += [
        f"{vehicle.get('color', '')} {vehicle.get('make', '')} {vehicle.get('action', vehicle.get('type', ''))}".strip()
        for vehicle in entities["vehicles"]
    ]
    people = entities.get("people_count", 0)
    vehicles = entities.get("vehicle_count", len(entities["vehicles"]))
    counts = f"{people} people, {vehicles} vehicles"
    return f"{counts}: {', '.join(named[:_MAX_NAMED_IN_A_SUMMARY])}" if named else counts


def _guess_entities(description: str) -> JsonObject:
    lowered = description.lower()
    guessed: JsonObject = {}
    for field, guesses in _GUESSES.items():
        value = next((value for value, words in guesses if any(word in lowered for word in words)), None)
        if value is not None:
            guessed[field] = value
    return guessed

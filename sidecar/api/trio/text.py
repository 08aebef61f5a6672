"""Read a model's answer as trio-core's callers expect: from free text, from sections, or from valid or broken JSON.

Pure functions over text. They reproduce the quirks of trio-core 1.1.5, because cortex stores the results.
`tests/parity` compares them with trio-core.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

JsonObject = dict[str, Any]

_CLOSED_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)

#: The sections of a scene answer, in search order. DESCRIPTION replaces SCENE.
_SECTIONS = ("SCENE:", "ACTIVITIES:", "NOTABLE:", "DESCRIPTION:")
#: Marks that end a section. The first mark *in this order* that occurs after the section's start ends the section, even
#: if another mark of the list occurs earlier in the text.
_SECTION_ENDS = ("SCENE:", "ACTIVITIES:", "NOTABLE:", "JSON:", "```")
_NOTHING_NOTABLE = frozenset({"nothing unusual", "nothing unusual.", "none", "n/a"})

#: Entities that are guessed from the words of a description without JSON. For each field: the values in order of
#: precedence, and the words that select each value.
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
        ("calm", ("",)),  # the default: "" occurs in every text
    ),
}

_PLAIN_TEXT_CHARACTERS = 300
_MAX_NAMED_IN_A_SUMMARY = 5


def strip_thinking(text: str) -> str:
    """Return the answer without the model's thinking: remove `<think>` blocks, also a block that is not closed."""
    text = _CLOSED_THINKING.sub("", text).strip()
    if "<think>" not in text:
        return text
    _, closed, after = text.rpartition("</think>")
    # If a `</think>` comes before the `<think>`, the text after the `</think>` is kept unchanged.
    return after.strip() if closed else text.partition("<think>")[0].strip()


def crop_descriptions(text: str, panels: Iterable[tuple[str, str]]) -> list[str]:
    """Return the answer's description of each zoom panel. `panels` holds label and class of each panel.

    The line of a panel is `A: ...`. A dash or star may precede the label, and `.`, `)` or `-` may replace the colon.
    The class is added in front, unless the model wrote it there. A panel without a line gets no description.
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
    """Return the description and the entities of a scene answer whose thinking is already removed.

    The description is built from the sections. Without sections it is built from the JSON. Without JSON it is the
    beginning of the text. Broken or incomplete JSON gives an empty description instead of garbage. Without JSON the
    entities are guessed from the words of the description, so they are never empty.
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
    """Return the text without the marks that begin and end a Markdown code block."""
    text = text.strip()
    if text.startswith("```"):
        text = text.partition("\n")[2] if "\n" in text else text[3:]
    if text.endswith("```"):
        text = text[:-3]
    return text.strip()


def _find_json(text: str) -> tuple[JsonObject, bool]:
    """Return the normalised object between the first and the last brace, or {}, and whether there is broken JSON."""
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
    """Return the entities with persons, vehicles and animals as lists of objects. Other fields are unchanged."""
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
    """Build a description from the JSON alone. If it uses DESCRIPTION or SCENE, it removes that from `entities`."""
    for key in ("DESCRIPTION", "SCENE"):
        if isinstance(entities.get(key), str):
            return str(entities.pop(key))
    summary = entities.get("summary")
    if isinstance(summary, str) and summary:
        return summary
    doing = [person.get("action", person.get("attire")) for person in entities["persons"]]
    named = ["person" if action is None else str(action) for action in doing]
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

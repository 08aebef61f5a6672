"""`/status`, `/history` and `/events` answer what their dataclasses say, and docs/reference.md says the same."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from real_parts import ROOT
from running import chat

from sidecar.admin.live import History, Tick
from sidecar.admin.status import Growth, Hold, KeyQueue, LimitChange, Status, Throttle
from sidecar.observe.time_series import FIELDS

REFERENCE = (ROOT / "docs" / "reference.md").read_text()
#: JSON's words for Python's types.
WORDS = {str: "text", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def check(value: Any, kind: Any, where: str, seen: set[type]) -> None:
    """Compare a value of a JSON document with its type, recursively. Add each dataclass to `seen`."""
    arguments = get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        assert isinstance(value, dict), where
        assert [*value] == [field.name for field in fields(kind)], where
        seen.add(kind)
        for name, part in value.items():
            check(part, hints[name], f"{where}.{name}", seen)
    elif get_origin(kind) in (Union, UnionType):
        [other] = (one for one in arguments if one is not type(None))
        if value is not None:
            check(value, other, where, seen)
    elif get_origin(kind) in (list, tuple):
        assert isinstance(value, list), where
        for at, part in enumerate(value):
            check(part, arguments[0], f"{where}[{at}]", seen)
    elif get_origin(kind) is dict:
        assert isinstance(value, dict), where
        for name, part in value.items():
            check(part, arguments[1], f"{where}[{name!r}]", seen)
    else:
        assert type(value) in ((int, float) if kind is float else (kind,)), (where, value)


def in_words(kind: Any) -> str:
    """Return a type as the document writes it."""
    arguments = get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        return f"[{kind.__name__}](#{kind.__name__.lower()})"
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(in_words, arguments))
    if get_origin(kind) in (list, tuple):
        return f"list of {in_words(arguments[0])}"
    if get_origin(kind) is dict:
        return f"object of {in_words(arguments[1])}"
    return WORDS[kind]


def parts(kind: Any) -> set[type]:
    """Return the dataclasses that a type contains."""
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        return {kind}.union(*(parts(hints[field.name]) for field in fields(kind)))
    return set().union(*map(parts, get_args(kind)))


def test_the_reference_names_every_field_with_its_type():
    for kind in parts(Status) | parts(History) | parts(Tick):
        section = re.search(rf"^### {kind.__name__}\n(.*?)(?=^##|\Z)", REFERENCE, re.MULTILINE | re.DOTALL)
        assert section, kind
        rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| [^|]+ \|$", section[1], re.MULTILINE)
        hints = get_type_hints(kind)
        assert rows == [(field.name, in_words(hints[field.name])) for field in fields(kind)], kind


def test_the_reference_names_every_value_of_a_point():
    section = REFERENCE.partition("### The values of a point\n")[2].partition("\n##")[0]
    assert re.findall(r"^\| `([\w.]+)` \|", section, re.MULTILINE) == [*FIELDS]


async def events(sidecar, number):
    """Return the name and the data of the first events of `/events`."""
    found = []
    async with sidecar.client.get(f"{sidecar.admin_url}/events") as response:
        name = ""
        async for line in response.content:
            key, _, value = line.decode().rstrip("\n").partition(": ")
            if key == "event":
                name = value
            elif key == "data":
                found.append((name, json.loads(value)))
                if len(found) == number:
                    break
    return found


async def get(sidecar, path):
    async with sidecar.client.get(sidecar.admin_url + path) as response:
        return await response.json()


async def test_an_idle_sidecar_answers_as_the_schema_says(serving):
    sidecar = await serving(backend="dashscope,simulated", dashscope_url="http://127.0.0.1:9/v1")
    seen = set()
    check(await get(sidecar, "/status"), Status, "status", seen)
    check(await get(sidecar, "/history"), History, "history", seen)
    assert Status in seen


async def test_a_sidecar_under_load_answers_as_the_schema_says(serving, scripted):
    """The provider refuses every call because traffic grows, so each part of an answer that may be null is there."""

    async def refuse(link, request):
        error = {"code": "limit_burst_rate", "message": "Request rate increased too quickly."}
        await link.answer({"error": error, "request_id": "r"}, 429)

    upstream = await scripted(refuse)
    sidecar = await serving(dashscope_url=upstream.origin)
    sampling = asyncio.ensure_future(sidecar.sidecar.parts.sampler.run())
    crowd = [
        asyncio.ensure_future(sidecar.post(chat(), headers={"X-Camera-Id": f"camera-{number % 3}"}).__aenter__())
        for number in range(20)
    ]
    await sidecar.until(lambda: sidecar.sidecar.admission.pool("qwen-vl-plus").upstreams[0].circuit.state)
    received = await events(sidecar, 3)
    assert [name for name, _ in received] == ["start", "tick", "tick"]
    seen = set()
    for name, data in received:
        check(data, History if name == "start" else Tick, name, seen)
    check(await get(sidecar, "/status"), Status, "status", seen)
    history = await get(sidecar, "/history")
    check(history, History, "history", seen)
    for series in history["history"].values():
        assert {len(point) for point in series["recent"] + series["whole"]} == {len(history["fields"])}
    assert {Growth, Hold, KeyQueue, LimitChange, Throttle} <= seen
    for task in (sampling, *crowd):
        task.cancel()
    await asyncio.gather(sampling, *crowd, return_exceptions=True)

"""Attacks of callers: by what they send, by how they send it, by how many connections, and by whose turn they take."""

from __future__ import annotations

import asyncio
import itertools
import socket

from attacks import bodies
from attacks.attack import Attack, Target
from attacks.sockets import (
    CHAT,
    CROPS,
    KIB,
    MIB,
    ask,
    connected,
    get,
    meanwhile,
    post,
    repeated,
    send,
    until_closed,
    until_cut,
)  # fmt: skip

_NATIVE = "/api/v1/services/aigc/multimodal-generation/generation"


async def tiny_objects(target: Target, seconds: float) -> None:
    paths = itertools.cycle((CHAT, _NATIVE, "/api/inference/describe"))
    await repeated(seconds, 1, lambda _: ask(target.port, post(next(paths), bodies.tiny_objects())))


async def deep_nesting(target: Target, seconds: float) -> None:
    await repeated(seconds, 1, lambda _: ask(target.port, post(CHAT, bodies.deep())))


async def million_digits(target: Target, seconds: float) -> None:
    await repeated(seconds, 4, lambda _: ask(target.port, post(CHAT, bodies.digits())))


async def invalid_1mb(target: Target, seconds: float) -> None:
    await repeated(seconds, 4, lambda _: ask(target.port, post(CHAT, bodies.invalid(MIB))))


async def invalid_13mb(target: Target, seconds: float) -> None:
    await repeated(seconds, 4, lambda _: ask(target.port, post(CHAT, bodies.invalid(13 * MIB))))


async def in_flight(target: Target, seconds: float) -> None:
    """80 bodies of 8 MB for a provider that never answers."""
    await repeated(seconds, 80, lambda _: ask(target.port, post(CHAT, bodies.with_image("hang", 8 * MIB))))


async def pictures(target: Target, seconds: float) -> None:
    """Four at once: of 49 megapixels, and of 8, which a 4K camera sends."""
    sides = itertools.cycle((7000, 2900))
    await repeated(seconds, 4, lambda _: ask(target.port, post(CROPS, bodies.crops(next(sides)))))


async def one_byte_chunks(target: Target, seconds: float) -> None:
    head = post(CHAT, 0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    request = head + b"1\r\na\r\n" * 200_000 + b"0\r\n\r\n"

    async def once(_: int) -> None:
        await ask(target.port, request)

    await repeated(seconds, 4, once)


async def garbage(target: Target, seconds: float) -> None:
    """Heads over the bound, an encoding that nobody knows, bytes that are no HTTP, a page of another origin."""
    requests = itertools.cycle((
        post(CHAT, bodies.chat(), "X: " + "y" * 60_000 + "\r\n"),
        post(CHAT, bodies.chat(), "Transfer-Encoding: gzip, chunked\r\n"),
        b"\x16\x03\x01\x02\x00" + b"\0" * 512,
        post(CHAT, bodies.chat(), "Origin: https://elsewhere.example\r\n"),
        post(CHAT, bodies.chat()) + b"\x00garbage",
    ))  # fmt: skip
    await repeated(seconds, 16, lambda _: ask(target.port, next(requests)))


async def pipelined(target: Target, seconds: float) -> None:
    """600 connections: one small request in flight, and 700 kB of a second one behind it."""
    requests = post(CHAT, bodies.chat("hang"), keep=True) + post(CHAT, MIB, keep=True) + b"{" * 700_000

    async def once(_: int) -> None:
        async with connected(target.port) as raw, meanwhile(send(raw, requests)):
            await until_cut(raw)

    await repeated(seconds, 600, once)


async def slow_bodies(target: Target, seconds: float) -> None:
    """300 bodies of 14 MB: the first 600 kB at once, then one kilobyte after the other."""
    head = post(CHAT, bodies.LARGEST) + b'{"model":"' + b"x" * 600_000

    async def once(_: int) -> None:
        async with connected(target.port) as raw, meanwhile(_trickle(raw, head)):
            await until_closed(raw)

    await repeated(seconds, 300, once)


async def _trickle(raw: socket.socket, head: bytes) -> None:
    await send(raw, head)
    while True:
        await asyncio.sleep(0.1)
        await send(raw, b"x" * KIB)


async def heads(target: Target, seconds: float) -> None:
    """1,500 connections, each with a head of 128 headers whose body never comes, or whose last line never comes."""
    headers = "".join(f"X-Header-{number}: {'v' * 40}\r\n" for number in range(120))
    whole = post(CHAT, MIB, headers)

    async def once(number: int) -> None:
        async with connected(target.port) as raw:
            await send(raw, whole if number % 2 else whole[:-2])
            await until_closed(raw)

    await repeated(seconds, 1500, once)


async def admin_idle(target: Target, seconds: float) -> None:
    async def once(number: int) -> None:
        async with connected(target.admin_port) as raw:
            await send(raw, (b"", b"GET /st", get("/events"))[number % 3])
            await until_cut(raw)

    await repeated(seconds, 300, once)


async def admin_busy(target: Target, seconds: float) -> None:
    paths = itertools.cycle(("/metrics", "/status", "/history", "/readyz", "/"))
    await repeated(seconds, 64, lambda _: ask(target.admin_port, get(next(paths))))


async def priority_flood(target: Target, seconds: float) -> None:
    """200 requests at once of one key, all with high priority."""
    request = post(CHAT, bodies.chat(), "X-Request-Priority: high\r\nX-Camera-Id: flood\r\n")
    await repeated(seconds, 200, lambda _: ask(target.port, request))


async def varying_cameras(target: Target, seconds: float) -> None:
    """100 requests at once, each with a key that no other request has."""
    numbers = itertools.count()
    await repeated(
        seconds, 100, lambda _: ask(target.port, post(CHAT, bodies.chat(), f"X-Camera-Id: {next(numbers)}\r\n"))
    )


async def varying_models(target: Target, seconds: float) -> None:
    """100 requests at once, each with a model that no other request has."""
    numbers = itertools.count()
    await repeated(seconds, 100, lambda _: ask(target.port, post(CHAT, bodies.chat(f"model-{next(numbers)}"))))


async def hanging(target: Target, seconds: float) -> None:
    """200 small requests at once, of one key, that the provider never answers."""
    request = post(CHAT, bodies.chat("hang"), "X-Camera-Id: hanging\r\n")
    await repeated(seconds, 200, lambda _: ask(target.port, request))


#: They make the process hold bytes.
HELD = {
    "80 bodies of 8 MB in flight": Attack("E5", in_flight),
    "pictures of 49 megapixels": Attack("E6", pictures),
    "pipelined bodies": Attack("E4", pipelined),
    "slow bodies": Attack("E4", slow_bodies),
    "heads of 128 headers": Attack("E4", heads),
}
#: They make the event loop work.
READ = {
    "tiny objects": Attack("E1", tiny_objects),
    "deep nesting": Attack("E1", deep_nesting),
    "a million digits": Attack("E1", million_digits),
    "invalid bodies of 1 MB": Attack("E3", invalid_1mb),
    "invalid bodies of 13 MB": Attack("E3", invalid_13mb),
    "chunks of one byte": Attack("E12", one_byte_chunks),
    "garbage": Attack("E7, E12", garbage),
    "idle strangers at the admin port": Attack("E8", admin_idle),
    "busy strangers at the admin port": Attack("E8", admin_busy),
}
#: They want more than their share.
TURNS = {
    "a flood of high priority": Attack("E10", priority_flood, ("--max-concurrency", "16")),
    "varying cameras": Attack("E10", varying_cameras),
    "varying models": Attack("E10", varying_models),
    "requests that are never answered": Attack("E5", hanging),
}

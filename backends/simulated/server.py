"""The simulated provider over HTTP: DashScope's two APIs, and a control interface for tests under `/_simulate`."""

from __future__ import annotations

import asyncio
import hmac
import socket
import struct
from dataclasses import asdict

import orjson
from aiohttp import ClientConnectionResetError, web

from backends.base import Dialect, Request
from backends.simulated.backend import models_body
from backends.simulated.profile import Profile, changed
from backends.simulated.provider import Call, Provider, Response
from backends.simulated.wire import FAULTS

#: The key of the provider in the application.
PROVIDER = web.AppKey("provider", Provider)
_KEY = web.AppKey("key", str)
#: Bytes of the largest accepted body: more than any caller may send.
_MAX_BODY_BYTES = 64 << 20

_NATIVE_PATH = "/api/v1/services/aigc/multimodal-generation/generation"


async def serve(
    provider: Profile | Provider, host: str = "127.0.0.1", port: int = 0, *, api_key: str = ""
) -> web.AppRunner:
    """Serve a provider until `cleanup()` of the returned runner is called.

    With port 0 the server uses a free port; the runner's `addresses` contain it. The provider is
    `runner.app[PROVIDER]`. If `api_key` is not empty, a caller without this key gets status 401.
    Raises `OSError` if the server cannot listen on the address.
    """
    if not isinstance(provider, Provider):
        provider = Provider(provider)
    provider.begin()
    app = web.Application(client_max_size=_MAX_BODY_BYTES)
    app[PROVIDER] = provider
    app[_KEY] = api_key
    for base in ("/v1", "/compatible-mode/v1"):
        app.router.add_post(f"{base}/chat/completions", _openai)
        app.router.add_get(f"{base}/models", _models)
    app.router.add_post(_NATIVE_PATH, _native)
    app.router.add_get("/_simulate/stats", _stats)
    app.router.add_post("/_simulate/profile", _change)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError:
        await runner.cleanup()
        raise
    return runner


async def _openai(request: web.Request) -> web.StreamResponse:
    return await _answer(request, "openai", stream=False)  # an OpenAI body itself requests a stream


async def _native(request: web.Request) -> web.StreamResponse:
    return await _answer(request, "native", stream=request.headers.get("X-DashScope-SSE") == "enable")


async def _answer(request: web.Request, dialect: Dialect, *, stream: bool) -> web.StreamResponse:
    if (refused := _check_key(request, dialect)) is not None:
        return refused
    counts = request.app[PROVIDER].counts
    body = await request.read()
    call = request.app[PROVIDER].call(
        Request(dialect, request.path, body, model="", stream=stream, headers=dict(request.headers))
    )
    try:
        response = await call.respond()
        if response.stream:
            return await _stream(request, response, call)
        if response.breaks:
            return await _break(request, response)
        return web.Response(
            status=response.status, headers={**response.headers, **response.limit_headers}, body=response.body
        )
    except ConnectionRefusedError:
        _abort(request)
        return web.Response()
    except (asyncio.CancelledError, ClientConnectionResetError):
        counts.disconnects += 1
        raise
    finally:
        call.leave()


async def _stream(request: web.Request, response: Response, call: Call) -> web.StreamResponse:
    reply = web.StreamResponse(headers={**response.headers, **response.limit_headers})
    await reply.prepare(request)
    while True:
        try:
            frame = await call.frame()
        except ConnectionResetError:
            _reset(request)
            return reply
        if frame is None:
            return reply
        await reply.write(frame.data)


async def _break(request: web.Request, response: Response) -> web.StreamResponse:
    """Send the head with the length of the whole body, then half of the body, and reset the connection."""
    reply = web.StreamResponse(headers={**response.headers, **response.limit_headers})
    reply.content_length = len(response.body)
    await reply.prepare(request)
    await reply.write(response.body[: len(response.body) // 2])
    _reset(request)
    return reply


def _abort(request: web.Request) -> None:
    """Close the connection without an answer."""
    if request.transport is not None:
        request.transport.abort()


def _reset(request: web.Request) -> None:
    """Send a TCP RST, so that the caller sees "connection reset by peer".

    With SO_LINGER on and a time of 0 seconds, closing a socket sends an RST.
    """
    if request.transport is not None:
        connection: socket.socket = request.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()


def _check_key(request: web.Request, dialect: Dialect) -> web.Response | None:
    key = request.app[_KEY]
    given = request.headers.get("Authorization", "").encode(errors="surrogateescape")  # as aiohttp decodes headers
    if not key or hmac.compare_digest(given, f"Bearer {key}".encode()):
        return None
    body = FAULTS["key"].body(dialect, "00000000-0000-0000-0000-000000000000")
    return web.Response(status=FAULTS["key"].status, body=body, content_type="application/json")


async def _models(request: web.Request) -> web.Response:
    refused = _check_key(request, "openai")
    return refused or web.Response(body=models_body(), content_type="application/json")


async def _stats(request: web.Request) -> web.Response:
    return web.Response(body=orjson.dumps(request.app[PROVIDER].counts.as_dict()), content_type="application/json")


async def _change(request: web.Request) -> web.Response:
    """Change fields of the profile. Other fields keep their values; null restores the default of a field."""
    provider = request.app[PROVIDER]
    try:
        values = orjson.loads(await request.read())
        if not isinstance(values, dict):
            raise ValueError("a profile is a JSON object")  # noqa: TRY004, TRY301  one error for one kind of answer
        provider.change(changed(provider.profile, values))
    except ValueError as error:  # also orjson's own error, which is a subclass
        return web.Response(status=400, body=orjson.dumps({"error": str(error)}), content_type="application/json")
    return web.Response(body=orjson.dumps(asdict(provider.profile)), content_type="application/json")

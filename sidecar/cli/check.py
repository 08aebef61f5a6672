"""`vlm-sidecar check`: print every setting with its source, then test each backend step by step.

The output contains no secrets: no part of a key and no password of a URL.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import struct
import sys
import time
import zlib
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson
from yarl import URL

from backends.base import (
    Backend,
    BackendError,
    BillingRefused,
    Rejected,
    Request,
    ServerFailed,
    Throttled,
    Timings,
    Unreachable,
)
from backends.http1.proxies import environment_proxy
from sidecar.assembly import StartError, make_backend, make_detector
from sidecar.settings import PASSWORD, SECRETS, Settings

#: Timeouts in seconds: for a connection, and for an answer (a model may have to load first).
_CONNECT_SECONDS, _ANSWER_SECONDS = 5.0, 60.0


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the check: its result, and advice if it failed."""

    backend: str
    name: str
    ok: bool
    seconds: float
    detail: str
    advice: str = ""


def check(settings: Settings, origins: dict[str, str], *, as_json: bool) -> int:
    """Print the settings and test every backend. Return the exit status: 0, or 1 if any step failed."""
    shown = list(_masked_settings(settings, origins))
    if as_json:
        steps = asyncio.run(_run_steps(settings, lambda step: None))
        report = {
            "ok": all(step.ok for step in steps),
            "settings": {name: {"value": value, "from": origin} for name, value, origin in shown},
            "steps": [asdict(step) for step in steps],
        }
        print(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode())
    else:
        widths = [max(len(row[column]) for row in shown) for column in (0, 1)]
        for name, value, origin in shown:
            print(f"  {name:{widths[0]}}  {value:{min(widths[1], 60)}}  {origin}")
        print(flush=True)
        steps = asyncio.run(_run_steps(settings, _print))
    return 0 if all(step.ok for step in steps) else 1


def _masked_settings(settings: Settings, origins: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield name, masked value and source of every setting."""
    for name in Settings.model_fields:
        value = ",".join(settings.backend_names) if name == "backend" else getattr(settings, name)
        if value is None:
            text = "auto" if name in ("max_concurrency", "requests_per_minute", "tokens_per_minute") else "-"
        elif name in SECRETS:
            text = f"*** ({len(value)} characters)"
        else:
            text = PASSWORD.sub("***", str(value).lower() if isinstance(value, bool) else str(value))
        yield name, text, origins.get(name, "default")


def _print(step: Step) -> None:
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    word = "ok" if step.ok else "FAIL"
    mark = f"\x1b[{32 if step.ok else 31}m{word:4}\x1b[0m" if colour else f"{word:4}"
    print(f"  {mark}  {step.backend:10} {step.name:10} {step.seconds * 1e3:7.0f} ms  {step.detail}")
    if step.advice:
        print(f"        -> {step.advice}")
    sys.stdout.flush()


async def _run_steps(settings: Settings, on_step: Callable[[Step], None]) -> list[Step]:
    """Test every configured backend, each up to its first failure, and the detector if one is configured."""
    steps: list[Step] = []
    for name in settings.backend_names:
        async for step in _test_backend(name, settings):
            steps.append(step)
            on_step(step)
            if not step.ok:
                break
    if settings.detector_model is not None:
        steps.append(await _detector(settings.detector_model))
        on_step(steps[-1])
    return steps


async def _detector(model: Path) -> Step:
    timer, detector = _StepTimer("detector"), make_detector(model)
    try:
        await detector.start()
    except BackendError as error:
        advice = "SIDECAR_DETECTOR_MODEL must name an ONNX export of YOLOv8, v10, v11 or RT-DETR"
        return timer.step("start", False, error.message, advice)
    finally:
        await detector.close()
    return timer.step("start", True, "the model loads, and its outputs are of a known layout")


async def _test_backend(name: str, settings: Settings) -> AsyncIterator[Step]:
    timer = _StepTimer(name)
    try:
        backend = make_backend(settings, name)
    except StartError as error:
        yield timer.step("settings", False, str(error))
        return
    if name == "dashscope":
        for step in _network(timer, settings.dashscope_url):
            yield step
            if not step.ok:
                return
    try:
        timer.restart()
        await backend.start()
        yield timer.step("start", True, "the backend has started")
        if name == "dashscope":
            yield await _models(timer, backend, settings)
        yield await _request(timer, backend, settings)
    except BackendError as error:
        yield timer.step("start", False, error.message)
    finally:
        await backend.close()


class _StepTimer:
    """Creates the steps of one backend and measures how long each takes."""

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self.restart()

    def restart(self) -> None:
        self._since = time.monotonic()

    def step(self, name: str, ok: bool, detail: str, advice: str = "") -> Step:
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        return Step(self._backend, name, ok, round(seconds, 4), detail, advice)


def _network(timer: _StepTimer, base_url: str) -> Iterator[Step]:
    """Test name resolution, connection and TLS one after the other, without a request to the provider."""
    url = URL(base_url)
    try:
        proxy = environment_proxy(url)
    except ValueError as error:
        yield timer.step("proxy", False, str(error), "name an http:// proxy, or none")
        return
    target = proxy or url
    host, port = target.host or "", target.port or 443
    if proxy is not None:
        yield timer.step("proxy", True, f"the way is by {host}:{port}, as the environment says")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        advice = "check the host in SIDECAR_DASHSCOPE_URL, and this machine's DNS (in a pod: its dnsPolicy)"
        yield timer.step("name", False, f"{host} cannot be resolved: {error.strerror}", advice)
        return
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    yield timer.step("name", True, f"{host} is {', '.join(addresses[:4])}")
    try:
        connection = socket.create_connection((host, port), _CONNECT_SECONDS)
    except OSError as error:
        advice = "check the port in SIDECAR_DASHSCOPE_URL, and that a firewall or network policy lets it out"
        yield timer.step("connection", False, f"{host}:{port}: {_reason(error)}", advice)
        return
    with connection:
        yield timer.step("connection", True, f"{connection.getpeername()[0]} port {port}")
        if target.scheme == "https":
            yield _tls(timer, connection, host)


def _tls(timer: _StepTimer, connection: socket.socket, host: str) -> Step:
    try:
        with ssl.create_default_context().wrap_socket(connection, server_hostname=host) as secure:
            until = ssl.cert_time_to_seconds(str((secure.getpeercert() or {})["notAfter"]))
            days = int((until - time.time()) / 86400)
            return timer.step("TLS", True, f"{secure.version()}, the certificate is good for {days} days")
    except ssl.SSLCertVerificationError as error:
        advice = "a private authority? name its file in SSL_CERT_FILE. Is this machine's clock right?"
        return timer.step(
            "TLS", False, f"the certificate of {host} is not to be trusted: {error.verify_message}", advice
        )
    except OSError as error:
        advice = "does this port speak https:// at all? try http:// in SIDECAR_DASHSCOPE_URL"
        return timer.step("TLS", False, f"no TLS with {host}: {_reason(error)}", advice)


async def _models(timer: _StepTimer, backend: Backend, settings: Settings) -> Step:
    """Request the list of models, which needs the key. A server without such a list is no failure."""
    timer.restart()
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            payload = orjson.loads(await backend.models())
    except Rejected as error:
        if error.status in (401, 403):
            return timer.step("key", False, error.message, _advice(error))
        return timer.step("models", True, f"the server lists none ({error.status})")
    except Throttled as error:
        return timer.step("models", True, f"throttled at this moment: {error.message}")
    except (BackendError, TimeoutError) as error:
        return timer.step("models", False, _message(error), _advice(error))
    listed = {entry.get("id") for entry in payload.get("data") or [] if isinstance(entry, dict)}
    model = settings.dashscope_model
    if model in listed:
        return timer.step("models", True, f"{model} is one of {len(listed)}")
    return timer.step("models", True, f"{model} is not among the {len(listed)} listed; the request will tell")


async def _request(timer: _StepTimer, backend: Backend, settings: Settings) -> Step:
    """Send one real request with a small picture and a short question."""
    model = (settings.local_model or "") if backend.name == "local" else settings.dashscope_model
    picture = "data:image/png;base64," + b64encode(_png(32)).decode()
    content = [
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "text", "text": "Which colour is this? One word."},
    ]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 8}
    request = Request("openai", "/chat/completions", orjson.dumps(body), model)
    timer.restart()
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            reply = await backend.send(request, Timings())
    except Throttled as error:
        detail = f"{error.message}. Key and model are right; the sidecar would wait for its turn"
        return timer.step("request", True, detail)
    except (BackendError, TimeoutError) as error:
        return timer.step("request", False, _message(error), _advice(error))
    cost = f" for {reply.usage.input_tokens} + {reply.usage.output_tokens} LLM tokens" if reply.usage else ""
    return timer.step("request", True, f"{model} answered{cost}")


def _message(error: Exception) -> str:
    return error.message if isinstance(error, BackendError) else f"no answer within {_ANSWER_SECONDS:g} s"


def _advice(error: Exception) -> str:
    """Return advice about a failed call."""
    match error:
        case BillingRefused():
            return "no retry helps: settle the account, or buy the model, in the provider's console"
        case Rejected(status=401 | 403):
            return "is SIDECAR_DASHSCOPE_API_KEY (or …_API_KEY_FILE) set, and a key of this provider's region?"
        case Rejected(status=404 | 405):
            return (
                "SIDECAR_DASHSCOPE_URL must end where the API begins, mostly in /v1; SIDECAR_DASHSCOPE_MODEL must exist"
            )
        case Rejected():
            return "is SIDECAR_DASHSCOPE_MODEL a model that takes pictures?"
        case ServerFailed():
            return (
                "is SIDECAR_DASHSCOPE_URL an OpenAI-compatible server? if so, the trouble is its own: try again later"
            )
        case Unreachable():
            return "the server closes connections: is there a proxy or firewall between, or does it restart?"
        case _:
            return "try again; if it stays so slow, raise SIDECAR_DEADLINE above the time that answers take"


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {_CONNECT_SECONDS:g} s"
    return error.strerror or type(error).__name__


def _png(side: int) -> bytes:
    """Return a PNG of a blue square with this side in pixels. Providers refuse pictures of only a few pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\x20\x40\xc0" * side) * side
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")

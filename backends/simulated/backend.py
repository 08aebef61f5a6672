"""The simulated provider as a backend in this process. It has the same contract and errors, and uses no sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import orjson

from backends.base import Reply, Request, Timings, Unreachable, Usage
from backends.remote.answers import output_bytes_of
from backends.remote.limit_headers import LimitReader
from backends.remote.output_meter import OutputMeter
from backends.remote.refusals import classify
from backends.simulated.profile import Profile
from backends.simulated.provider import MODELS, Call, Frame, Provider


class SimulatedBackend:
    """A backend for a simulated provider. Several backends can share one provider, as tenants of one account."""

    name = "simulated"
    model_id = None
    slots = None
    has_native_api = False

    def __init__(self, provider: Profile | Provider | None = None) -> None:
        self.provider = provider if isinstance(provider, Provider) else Provider(provider or Profile())
        self._limits = LimitReader()

    def account(self) -> str:
        """Return the backend's name, see `Backend.account`."""
        return self.name

    def unready_reason(self) -> None:
        """Return None: the simulated provider is always reachable."""

    async def start(self) -> None:
        """Start the clock of the profile's times, see `Provider.begin`."""
        self.provider.begin()

    async def send(self, request: Request, timings: Timings) -> Reply:
        """Make one attempt, see `Backend.send`. Cancelling it returns the provider's permit at once."""
        loop = asyncio.get_running_loop()
        timings.work_started = loop.time()
        call = self.provider.call(request)
        try:
            response = await call.respond()
            timings.first_byte = loop.time()
            limits = self._limits.read(response.limit_headers) if response.limit_headers else ()
            if response.status != 200:
                error = classify(response.status, response.headers, response.body)
                error.limits = limits
                raise error  # noqa: TRY301
            if response.breaks:
                raise ConnectionResetError("the simulated provider reset the connection in the middle of its answer")  # noqa: TRY301
            if not response.stream:
                call.leave()
                return Reply(200, response.headers, response.body, usage=response.usage, limits=limits)
            first = await call.frame()
            if first is not None and first.error is not None:
                raise classify(first.error[0], {}, first.error[1])  # noqa: TRY301
        except OSError as error:
            call.leave()
            raise Unreachable(str(error)) from error
        except BaseException:
            call.leave()
            raise
        meter = OutputMeter(loop.time, output_bytes_of)
        meter.skip()  # the first frame has arrived
        reply = Reply(200, response.headers, progress=meter.progress, limits=limits)
        chunks = reply.chunks = _chunks(reply, call, first, response.usage, meter)

        async def close() -> None:
            await chunks.aclose()
            call.leave()
            reply.output_bytes = meter.output_bytes

        reply.closer = close
        return reply

    async def models(self) -> bytes:
        """Return the list of models in OpenAI's format."""
        return models_body()

    async def close(self) -> None:
        """Do nothing: this backend has no resources to release."""


async def _chunks(
    reply: Reply, call: Call, first: Frame | None, usage: Usage | None, meter: OutputMeter
) -> AsyncGenerator[bytes]:
    frame = first
    try:
        while frame is not None:
            if frame.error is not None:
                reply.failure = classify(frame.error[0], {}, frame.error[1])
            meter.feed(frame.data)
            yield frame.data
            frame = await call.frame()
    except ConnectionResetError as error:
        raise Unreachable(str(error)) from error
    finally:
        call.leave()
    if reply.failure is None:
        reply.usage = usage


def models_body() -> bytes:
    """Return the body of `GET /v1/models`."""
    models = [{"id": model, "object": "model", "created": 0, "owned_by": "simulated"} for model in MODELS]
    return orjson.dumps({"object": "list", "data": models})

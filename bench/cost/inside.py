"""Measure the processor time of a request in the sidecar's own code, without sockets, kernel and network.

    python -m bench.cost.inside [small|frame]      # prints microseconds of processor time

Runs the real listener, API, admission, dispatcher and backend between fake transports, which only call callbacks. It
uses one core and never sleeps. So two versions of the code can be compared with an accuracy of 1 %, while `make bench`
needs an idle machine.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import uvloop
from prometheus_client import CollectorRegistry

from backends.http1.aiohttp_parts import ResponseProtocol
from backends.http1.answer_bytes import AnswerBytes
from backends.http1.server import Connection, Listener
from backends.remote.backend import DashScopeBackend
from bench.cost.side_by_side import bodies
from bench.cost.wire import WHOLE, request_of
from sidecar.admission import Admission, UpstreamSettings
from sidecar.api.call import CallSettings
from sidecar.api.server import DataServer
from sidecar.dispatch.dispatcher import Dispatcher
from sidecar.dispatch.model_list import ModelList
from sidecar.foreign_pages import ForeignPages
from sidecar.observe.metrics import Metrics

ROUNDS, REQUESTS = 12, 1_500


class _Transport:
    """A fake transport that passes written data to a callback."""

    def __init__(self, written: Callable[[Any], object]) -> None:
        self.write = self.writelines = written

    def set_write_buffer_limits(self, high: int) -> None:
        """Do nothing: what is written does not wait."""

    def is_closing(self) -> bool:
        return False

    def get_extra_info(self, name: str) -> None:
        """Return None: there is no socket."""


class _Pooled:
    """A connection in the form that aiohttp's connector returns."""

    def __init__(self, protocol: ResponseProtocol) -> None:
        self.protocol = protocol


async def microseconds(body: bytes) -> float:
    """Send one request after another; return the mean of the fastest round, in microseconds of processor time."""
    loop = asyncio.get_running_loop()
    answers = AnswerBytes(256 * 1024 * 1024)
    backend = DashScopeBackend(base_url="http://127.0.0.1:1/v1", answers=answers)
    await backend.start()
    upstream = ResponseProtocol(loop)
    answer = partial(loop.call_soon, upstream.data_received, WHOLE)
    upstream.connection_made(cast("asyncio.Transport", _Transport(lambda _: answer())))

    async def connect(*_: object) -> _Pooled:
        return _Pooled(upstream)

    cast("Any", backend)._connector.connect_new = connect
    admission = Admission([UpstreamSettings(backend.name)], answer_bytes=answers.held_bytes)
    answers.in_flight = admission.bytes_in_flight
    parts = admission, [backend], Metrics(CollectorRegistry())
    data = DataServer(Dispatcher(*parts), CallSettings(), ModelList(*parts), foreign_pages=ForeignPages())
    connection = Connection(Listener(data, max_connections=1, answers=answers), loop)
    answered = asyncio.Event()
    connection.connection_made(cast("asyncio.Transport", _Transport(lambda _: answered.set())))
    request, rounds = request_of(body), []
    gc.collect()
    # Like the start of the sidecar (`app.py`): exclude the objects of the imports, so that garbage collections do not
    # scan them.
    gc.freeze()
    gc.set_threshold(10_000)
    for _ in range(ROUNDS):
        began = time.process_time()
        for _ in range(REQUESTS):
            answered.clear()
            connection.data_received(request)
            await answered.wait()
            await asyncio.sleep(0)  # the connection's task ends
        rounds.append((time.process_time() - began) / REQUESTS * 1e6)
    return min(rounds)


if __name__ == "__main__":
    print(f"{uvloop.run(microseconds(bodies()[sys.argv[1] if sys.argv[1:] else 'frame'])):.1f}")

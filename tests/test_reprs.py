"""The reprs of the main objects: one line with the values that matter, and no key, body or secret."""

from __future__ import annotations

import asyncio

import pytest
from running import chat

from sidecar.dispatch.deadlines import Deadlines
from sidecar.dispatch.dispatcher import Dispatcher
from sidecar.observe import series
from sidecar.observe.gauges import AdmissionGauges
from sidecar.observe.trace import TracingStopwatch

SECRETS = ("sk-provider", "sk-caller", "camera-key", "SECRET PROMPT", "base64")


#: Text that the repr must contain, and how to get the object. One request is in flight on the route, and one waits.
OBJECTS = {
    "Sidecar dashscope data_port=": lambda sidecar, route: sidecar,
    "Health started=True draining=False": lambda sidecar, route: sidecar.parts.health,
    "AdminServer viewers=0": lambda sidecar, route: sidecar.parts.admin,
    "StateFile '": lambda sidecar, route: sidecar.parts.state_file,
    "limits=0 admissions=1": lambda sidecar, route: sidecar.parts.state_file,
    "Sampler dashscope uptime=": lambda sidecar, route: sidecar.parts.sampler,
    "TimeSeries recent=0 whole=0": lambda sidecar, route: sidecar.parts.sampler.time_series["dashscope"],
    "Metrics requests=0 attempts=0": lambda sidecar, route: sidecar.parts.metrics,
    "Counter sidecar_x series=0": lambda sidecar, route: series.Counter("sidecar_x", "", ()),
    "Histogram sidecar_y series=0": lambda sidecar, route: series.Histogram("sidecar_y", "", (), (1.0,)),
    "Route dashscope has_answered=False retries=10.0": lambda sidecar, route: route,
    "Dispatcher dashscope draining=False": lambda sidecar, route: Dispatcher([route], sidecar.parts.metrics),
    "AdmissionGauges dashscope": lambda sidecar, route: AdmissionGauges({"dashscope": route.admission}),
    "lanes=1 waiting=1 in_flight=1 draining=False": lambda sidecar, route: route.admission,
    "waiting=1 cause=concurrency in_flight=1": lambda sidecar, route: lane(route),
    "Limits requests=inf/s tokens=inf/s <Permits": lambda sidecar, route: lane(route).limits,
    "RateController start limit=inf/s unsure=": lambda sidecar, route: lane(route).limits.requests,
    "TokenBucket level=": lambda sidecar, route: lane(route).limits.requests._bucket,
    "Permits in_flight=1 allowed=1 learned=inf": lambda sidecar, route: lane(route).limits.permits,
    "Hold open probing=False": lambda sidecar, route: lane(route).limits.hold,
    "tickets=1 bytes=": lambda sidecar, route: lane(route).queue,
    "NORMAL model='qwen-vl-plus' attempts=0 backend='dashscope'": lambda sidecar, route: waiting(route),
    "<Stopwatch in queue": lambda sidecar, route: waiting(route),
    "Permit held <Ticket 0x": lambda sidecar, route: permit(route),
    "beside=0 bound=None probe=False": lambda sidecar, route: permit(route)._attempt,
    "TracingStopwatch in queue": lambda sidecar, route: TracingStopwatch(0.0, arrived=0.0, trace_id=1, parent_id=2),
    "Deadlines active=0 timer_at=inf": lambda sidecar, route: Deadlines(asyncio.get_running_loop()),
    "when=60.000 expired=False": lambda sidecar, route: Deadlines(asyncio.get_running_loop()).until(60.0),
}


def lane(route):
    return route.admission.lane("qwen-vl-plus")


def waiting(route):
    """Return the ticket that waits."""
    return next(iter(lane(route).queue.tickets))


def permit(route):
    """Return a permit of another model: the only permit of the first model belongs to the running request."""
    return route.admission.lane("other")._start(waiting(route), 0.0)


@pytest.fixture
async def busy(serving, provider, tmp_path):
    """A sidecar with one request in flight and one that waits."""
    url, simulated = await provider(latency_seconds=30.0)
    keys = {"dashscope_api_key": "sk-provider", "api_key": "sk-caller"}
    started = await serving(dashscope_url=url, max_concurrency=1, state_file=str(tmp_path / "limits"), **keys)
    headers = {"X-Camera-Id": "camera-key", "Authorization": "Bearer sk-caller"}
    requests = [asyncio.ensure_future(started.post(chat("SECRET PROMPT"), headers=headers).__aenter__()) for _ in "ab"]
    route = started.sidecar.routes[0]
    await started.until(lambda: simulated.counts.in_flight == 1 and route.admission.waiting() == 1)
    yield started.sidecar, route
    for request in requests:
        request.cancel()
    await asyncio.gather(*requests, return_exceptions=True)


@pytest.mark.parametrize(("expected", "find"), OBJECTS.items(), ids=OBJECTS)
async def test_a_repr_is_one_line_with_the_main_values_and_no_secret(busy, expected, find):
    text = repr(find(*busy))
    assert text.startswith("<") and text.endswith(">")
    assert expected in text
    assert "\n" not in text
    assert not [secret for secret in SECRETS if secret in text]

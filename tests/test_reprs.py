"""The reprs of the main objects: one line with the values that matter, and no key, body or secret."""

from __future__ import annotations

import asyncio

import pytest
from running import chat

from sidecar.admission.gates.bucket import TokenBucket
from sidecar.dispatch.deadlines import Deadlines
from sidecar.dispatch.dispatcher import Dispatcher
from sidecar.observe import instruments
from sidecar.observe.gauges import AdmissionGauges
from sidecar.observe.trace import TracingStopwatch

SECRETS = ("sk-provider", "sk-caller", "camera-key", "SECRET PROMPT", "base64")


def waiting(pool):
    """Return the ticket that waits."""
    return next(iter(pool.waiting.tickets))


def permit(sidecar, pool):
    """Return a permit of another model: the only permit of the first model belongs to the running request."""
    return sidecar.admission.pool("other").upstreams[0].start(0.0, waiting(pool), lambda _: None)


#: Text that the repr must contain, and how to get the object. One request is in flight, and one waits.
OBJECTS = {
    "Sidecar dashscope data_port=": lambda sidecar, pool: sidecar,
    "Health started=True draining=False": lambda sidecar, pool: sidecar.parts.health,
    "AdminServer viewers=0": lambda sidecar, pool: sidecar.parts.admin,
    "StateFile '": lambda sidecar, pool: sidecar.parts.state_file,
    "limits=0 upstreams=1": lambda sidecar, pool: sidecar.parts.state_file,
    "Sampler dashscope uptime=": lambda sidecar, pool: sidecar.parts.sampler,
    "TimeSeries recent=0 whole=0": lambda sidecar, pool: sidecar.parts.sampler.time_series["dashscope"],
    "Metrics requests=0 attempts=0": lambda sidecar, pool: sidecar.parts.metrics,
    "Counter sidecar_x series=0": lambda sidecar, pool: instruments.Counter("sidecar_x", "", ()),
    "Histogram sidecar_y series=0": lambda sidecar, pool: instruments.Histogram("sidecar_y", "", (), (1.0,)),
    "Dispatcher dashscope draining=False": lambda sidecar, pool: Dispatcher(
        sidecar.admission, sidecar.parts.backends, sidecar.parts.metrics
    ),
    "AdmissionGauges dashscope": lambda sidecar, pool: AdmissionGauges([sidecar.admission]),
    "pools=1 waiting=1 in_flight=1 draining=False": lambda sidecar, pool: sidecar.admission,
    "dashscope waiting=1 cause=concurrency": lambda sidecar, pool: pool,
    "Upstream dashscope 'qwen-vl-plus' <ConcurrencyGate": lambda sidecar, pool: pool.upstreams[0],
    "PolicerLearner start limit=inf/s unsure=": lambda sidecar, pool: pool.upstreams[0].requests.learner,
    "TokenBucket level=": lambda sidecar, pool: TokenBucket(0.0, 1.0, 2.0),
    "ConcurrencyGate in_flight=1 allowed=1 learned=inf": lambda sidecar, pool: pool.upstreams[0].concurrency,
    "Circuit closed probing=False": lambda sidecar, pool: pool.upstreams[0].circuit,
    "tickets=1 cause=concurrency": lambda sidecar, pool: pool.waiting,
    "FairQueue 0x": lambda sidecar, pool: pool.waiting.queue,
    "tickets=0": lambda sidecar, pool: pool.waiting.later,
    "NORMAL model='qwen-vl-plus' attempts=": lambda sidecar, pool: waiting(pool),
    "<Stopwatch in queue": lambda sidecar, pool: waiting(pool).stopwatch,
    "Permit held <Ticket 0x": permit,
    "TracingStopwatch in queue": lambda sidecar, pool: TracingStopwatch(0.0, arrived=0.0, trace_id=1, parent_id=2),
    "Deadlines active=0 timer_at=inf": lambda sidecar, pool: Deadlines(asyncio.get_running_loop()),
    "when=60.000 expired=False": lambda sidecar, pool: Deadlines(asyncio.get_running_loop()).until(60.0),
}


@pytest.fixture
async def busy(serving, provider, tmp_path):
    """A sidecar with one request in flight and one that waits."""
    url, simulated = await provider(latency_seconds=30.0)
    keys = {"dashscope_api_key": "sk-provider", "api_key": "sk-caller"}
    started = await serving(dashscope_url=url, max_concurrency=1, state_file=str(tmp_path / "limits"), **keys)
    headers = {"X-Camera-Id": "camera-key", "Authorization": "Bearer sk-caller"}
    requests = [asyncio.ensure_future(started.post(chat("SECRET PROMPT"), headers=headers).__aenter__()) for _ in "ab"]
    admission = started.sidecar.admission
    await started.until(lambda: simulated.counts.in_flight == 1 and admission.waiting() == 1)
    yield started.sidecar, admission.pool("qwen-vl-plus")
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

"""A caller who names many models, cameras or hosts makes the sidecar forget nothing about those in use."""

from __future__ import annotations

import asyncio
import gc
from math import inf

import orjson
import pytest

from bench.sim import clock
from sidecar.admission import Admission, NotAdmitted, Ticket, Verdict
from sidecar.admission.admission import MAX_POOLS
from sidecar.admission.retry_after import MAX_RESERVED, Promises
from sidecar.api.parse_turns import ParseTurns
from sidecar.foreign_pages import ForeignPages
from sidecar.state_file import MAX_LIMITS, StateFile

#: What a provider says about a model that does not exist: each may teach something, or open a circuit.
ABOUT_UNKNOWN_MODELS = {
    "404": ("accepted", None),
    "429": ("refused", "request_rate"),
    "concurrency": ("refused", "concurrency"),
    "403": ("account", None),
    "quota": ("account", "quota_period"),
    "500": ("failed", None),
}


async def ask(admission, model, *verdicts, key=""):
    """Make one attempt after the other, each with one of the verdicts; no verdict: an answer."""
    loop = asyncio.get_running_loop()
    for outcome, named in verdicts or [("accepted", None)]:
        try:
            ticket = Ticket(now=loop.time(), deadline=loop.time() + 30.0, key=key, model=model, tokens=100.0)
            with await admission.permit(ticket) as permit:
                await asyncio.sleep(0.01)
                usage = (100, 20) if not verdicts else None
                permit.report(Verdict(outcome, loop.time(), named, usage=usage, reason="" if usage else "refused"))
        except NotAdmitted:
            pass


def state(admission, model):
    """Return what is known of a model."""
    [upstream] = admission.pool(model).upstreams
    return upstream.learned(), upstream.circuit.state, upstream.exists, upstream.has_answered


async def learn(admission, what):
    for _ in range(20):
        await ask(admission, "used")
    match what:
        case "limit":
            admission.pool("used").upstreams[0].recall(
                admission.loop.time(), {"requests": {"limit": 7.0, "burst": 3.0, "uncertainty": 0.02}}, 1.0
            )
        case "quota":
            await ask(admission, "used", ("account", "quota_period"))
        case "money":
            await ask(admission, "used", ("account", None))
        case "outage":
            await ask(admission, "used", *[("failed", None)] * 8)


@pytest.mark.parametrize("said", ABOUT_UNKNOWN_MODELS.values(), ids=ABOUT_UNKNOWN_MODELS)
@pytest.mark.parametrize("what", ["limit", "quota", "money", "outage"])
def test_what_was_learned_of_a_model_in_use_survives_any_number_of_names(what, said):
    async def main():
        admission = Admission()
        await learn(admission, what)
        pool, before = admission.pool("used"), state(admission, "used")
        assert before[0] if what == "limit" else before[1]
        for number in range(4 * MAX_POOLS):
            await ask(admission, f"no-model-{number}", said, said)
        assert admission.pool("used") is pool
        known, circuit, *rest = state(admission, "used")
        assert (known, bool(circuit), rest) == (before[0], bool(before[1]), list(before[2:]))
        assert len(admission._pools) <= MAX_POOLS

    clock.run(main())


def test_thousands_of_names_take_the_memory_of_a_few():
    async def main():
        admission = Admission()
        await learn(admission, "limit")
        before = state(admission, "used")
        for number in range(3000):
            pool = admission.pool(f"no-model-{number}")
            pool.last_used = admission.loop.time()
        assert state(admission, "used") == before
        assert len(admission._pools) == len(admission._upstreams) == MAX_POOLS

    clock.run(main())


@pytest.mark.parametrize("said", [(), *ABOUT_UNKNOWN_MODELS.values()], ids=["200", *ABOUT_UNKNOWN_MODELS])
def test_a_forgotten_model_leaves_nothing_to_the_garbage_collector(said):
    """A collection of thousands of objects would stop the event loop."""

    async def main():
        admission = Admission()
        for number in range(MAX_POOLS):
            await ask(admission, f"old-{number}")
        gc.collect()
        gc.disable()
        try:
            for number in range(100):
                await ask(admission, f"no-model-{number}", *[said] * 3 if said else ())
            assert len(admission._pools) == MAX_POOLS
            assert gc.collect() == 0
        finally:
            gc.enable()

    clock.run(main())


async def test_the_state_file_keeps_the_limits_of_models_in_use(tmp_path):
    admission = Admission()
    state_file = StateFile(tmp_path / "limits.json", admission, {"": lambda: "account"})

    def learned(model, limit):
        [upstream] = admission.pool(model).upstreams
        values = {"requests": {"limit": limit, "burst": 5.0, "uncertainty": 0.02}}
        upstream.recall(admission.loop.time(), values, 1.0)
        return upstream

    learned("used", 7.0).exists = True
    state_file.save()
    for number in range(2 * MAX_LIMITS):
        learned(f"no-model-{number}", 3.0)
        if number % 20 == 0:
            state_file.save()
    state_file.save()
    limits = orjson.loads((tmp_path / "limits.json").read_bytes())["limits"]
    assert len(limits) <= MAX_LIMITS
    assert [limit["requests"]["limit"] for limit in limits if limit["model"] == "used"] == [7.0]


def test_reserved_places_survive_a_hundred_thousand_keys():
    promises = Promises()
    waits = {f"camera-{number}": promises.make(0.0, f"camera-{number}", 5.0, 10.0) for number in range(10)}
    for number in range(100_000):
        promises.redeem(1.0, f"other-{number}")
        if number % 20 == 0:
            promises.make(1.0, f"other-{number}", 60.0, 10.0)
    assert len(promises) <= MAX_RESERVED
    for key, seconds in sorted(waits.items(), key=lambda item: item[1]):
        assert promises.redeem(seconds, key), key


def test_hosts_and_origins_are_not_remembered():
    pages = ForeignPages(["cams.example.com"])

    def refusal(host, origin):
        return pages.refusal({"Host": host, "Origin": origin}, own_page=True)

    before = repr(vars(pages))
    for number in range(10_000):
        assert refusal(f"host-{number}.example.net", f"http://host-{number}.example.net") is not None
    assert repr(vars(pages)) == before
    assert refusal("cams.example.com:9464", "http://cams.example.com:9464") is None


async def test_sources_of_bodies_are_forgotten_once_nothing_waits():
    turns = ParseTurns()
    await asyncio.gather(*(turns.run(f"key-{number}", 1000, lambda: None) for number in range(500)))
    assert not turns._places
    assert turns._virtual_bytes < inf

"""Learned limits survive a restart, and a damaged state file never prevents a start."""

from __future__ import annotations

import asyncio
import signal
import time

import aiohttp
import orjson
import pytest
from running import CHAT, Process, chat

from backends.simulated import Profile, Provider
from bench.sim import clock
from bench.sim.load import Run
from bench.sim.systems import Sidecar
from sidecar.admission import Admission
from sidecar.state_file import StateFile

LEARNED = {"requests": {"limit": 10.0, "burst": 5.0, "uncertainty": 0.02}, "concurrency": {"limit": 8.0}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "limits.json"


def write(path, age=0.0, version=1, account="account", **learned):
    one = {"account": account, "model": "m", "learned_at": time.time() - age, **(learned or LEARNED)}
    path.write_bytes(orjson.dumps({"version": version, "limits": [one]}))


def state_file_of(path, account="account"):
    admission = Admission()
    state_file = StateFile(path, [(lambda: account, admission)])
    state_file.load()
    return state_file, admission


def recalled_limits(path, account="account"):
    _, admission = state_file_of(path, account)
    return {model: lane.limits.requests.limit for model, lane in admission.lanes.items()}


def learn(admission, limit=10.0, model="m"):
    now = admission.loop.time()
    admission.lane(model).limits.requests.recall(now, limit, 5.0)


async def test_a_learned_limit_is_recalled_with_a_discount(path):
    state_file, admission = state_file_of(path)
    learn(admission)
    state_file.save()
    assert recalled_limits(path) == {"m": pytest.approx(8.0)}


async def test_every_dimension_is_recalled(path):
    write(path, tokens={"limit": 1000.0, "burst": 3000.0, "uncertainty": 0.02}, **LEARNED)
    _, admission = state_file_of(path)
    limits = admission.lanes["m"].limits
    assert limits.tokens.limit == pytest.approx(800.0)
    assert limits.permits.learned == 6


async def test_an_older_limit_gets_a_larger_discount_and_a_very_old_limit_is_ignored(path):
    write(path, age=7200.0)
    assert recalled_limits(path) == {"m": pytest.approx(5.0)}
    write(path, age=100_000.0)
    assert recalled_limits(path) == {}


async def test_restarts_without_traffic_do_not_lower_a_limit(path):
    write(path, age=600.0)
    before = path.read_bytes()
    for _ in range(3):
        state_file, _ = state_file_of(path)
        state_file.save()
    assert path.read_bytes() == before


async def test_a_model_without_traffic_keeps_its_age_and_its_limit(path):
    write(path, age=600.0)
    state_file, admission = state_file_of(path)
    learn(admission, 3.0, "busy")
    state_file.save()
    ages = {one["model"]: time.time() - one["learned_at"] for one in orjson.loads(path.read_bytes())["limits"]}
    assert ages == {"m": pytest.approx(600.0, abs=5.0), "busy": pytest.approx(0.0, abs=5.0)}
    assert recalled_limits(path) == {"m": pytest.approx(8.0), "busy": pytest.approx(2.4)}


async def test_another_account_recalls_nothing_and_the_first_account_keeps_its_limits(path):
    write(path, account="other")
    state_file, admission = state_file_of(path)
    assert not admission.lanes
    learn(admission, 3.0)
    state_file.save()
    assert recalled_limits(path, "account") == {"m": pytest.approx(2.4)}
    assert recalled_limits(path, "other") == {"m": pytest.approx(8.0)}


async def test_a_rotated_key_is_another_account_from_the_next_save_on(path):
    names = ["old key"]
    admission = Admission()
    state_file = StateFile(path, [(lambda: names[-1], admission)])
    learn(admission)
    state_file.save()
    names.append("new key")
    state_file.save()
    assert recalled_limits(path, "old key") == recalled_limits(path, "new key") == {"m": pytest.approx(8.0)}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b'"text"', b'{"version": 1}', b'{"version": 1, "limits": [1]}', b"\xff\xfe",
        b'{"version": 1, "limits": [{"account": "account", "model": "m", "learned_at": null}]}',
    ],
)  # fmt: skip
async def test_a_damaged_file_is_ignored_with_one_warning_and_written_again(path, content, caplog):
    path.write_bytes(content)
    state_file, admission = state_file_of(path)
    assert not admission.lanes
    assert caplog.text.count("it is damaged") == 1
    learn(admission)
    state_file.save()
    assert recalled_limits(path) == {"m": pytest.approx(8.0)}


@pytest.mark.parametrize("limit", [-1, 0, "many", None, 1e300])
async def test_an_invalid_limit_is_ignored_with_a_warning(path, limit, caplog):
    write(path, requests={"limit": limit, "burst": 1.0, "uncertainty": 0.02})
    assert recalled_limits(path) == {}
    assert "it is damaged" in caplog.text


async def test_a_file_of_another_version_is_ignored(path, caplog):
    write(path, version=2)
    assert recalled_limits(path) == {}
    assert "version is 2" in caplog.text


async def test_the_file_size_is_bounded_for_any_number_of_model_names(path, monkeypatch):
    monkeypatch.setattr("sidecar.state_file.MAX_LIMITS", 3)
    state_file, admission = state_file_of(path)
    for number in range(5):
        learn(admission, model=f"model-{number}")
        state_file.save()
    assert recalled_limits(path).keys() == {"model-2", "model-3", "model-4"}


async def test_without_learned_limits_no_file_is_written(path):
    state_file, _ = state_file_of(path)
    state_file.save()
    assert not path.exists()


async def test_an_unreadable_or_unwritable_file_is_logged_once_and_serving_continues(tmp_path, caplog):
    tmp_path.joinpath("limits.json").mkdir()
    state_file, admission = state_file_of(tmp_path / "limits.json")
    for limit in (10.0, 11.0):
        learn(admission, limit)
        state_file.save()
    assert [record.message.partition(": ")[0].split(" ", 1)[1] for record in caplog.records] == [
        "cannot be read",
        "cannot be written",
    ]


async def test_the_file_is_saved_periodically_and_never_left_half_written(path, monkeypatch):
    monkeypatch.setattr("sidecar.state_file.SAVE_EVERY_SECONDS", 0.01)
    state_file, admission = state_file_of(path)
    running = asyncio.create_task(state_file.run())
    learn(admission)
    async with asyncio.timeout(10):
        while not path.exists():  # noqa: ASYNC110  no event exists for the file
            await asyncio.sleep(0.005)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert recalled_limits(path) == {"m": pytest.approx(8.0)}
    assert list(path.parent.iterdir()) == [path]


def test_a_restart_under_load_costs_few_refusals_and_little_time():
    """Forty callers always wait, 10 requests/s are accepted, and a second sidecar starts with the learned limits."""

    async def main():
        provider = Provider(
            Profile(
                requests_per_second=10, burst_requests=10, latency_seconds=0.5, refusal_latency_seconds=0.05, seed=1
            )
        )
        first = Sidecar(provider)
        await Run(first, 60.0).saturate(40)
        accepted, refused = provider.counts.accepted, provider.counts.refused.total()
        second = Sidecar(provider)
        second.admission.recall(first.admission.learned(), 0.8)
        await Run(second, 10.0).saturate(40)
        return provider.counts.accepted - accepted, provider.counts.refused.total() - refused

    accepted, refused = clock.run(main())
    assert refused <= 3
    assert accepted >= 75  # of 100: the second sidecar starts at 0.8 of the learned limit


async def saturate(url, client, seconds, workers=20):
    """Keep `workers` requests waiting for some seconds, then disconnect. Return the set of statuses."""
    statuses = set()

    async def worker():
        while True:
            async with client.post(url + CHAT, json=chat()) as response:
                await response.read()
                statuses.add(response.status)

    tasks = [asyncio.ensure_future(worker()) for _ in range(workers)]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    assert all(isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*tasks, return_exceptions=True))
    return statuses


async def test_a_process_restarted_under_load_gets_few_refusals_and_writes_no_key(path, provider):
    url, simulated = await provider(requests_per_second=8, burst_requests=4, latency_seconds=0.1)
    options = ("--dashscope-url", url, "--dashscope-api-key", "sk-do-not-tell", "--state-file", str(path))
    refused = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
        for _ in range(2):
            before = simulated.counts.refused["request_rate"]
            async with Process(*options) as process:
                assert await saturate(process.url, client, 2.0) == {200}
                process.signal(signal.SIGTERM)
                assert await process.ended() == 0
            refused.append(simulated.counts.refused["request_rate"] - before)
    first, second = refused
    assert first >= 8  # the refusals of a start without learned limits
    assert second <= 2
    assert b"sk-do-not-tell" not in path.read_bytes()
    assert process.log.count("STATE_FILE") == 0

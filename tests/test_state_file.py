"""Learned limits survive a restart. A damaged file never prevents the start of a sidecar."""

from __future__ import annotations

import asyncio
import os
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
    entry = {"account": account, "model": "m", "learned_at": time.time() - age, **(learned or LEARNED)}
    path.write_bytes(orjson.dumps({"version": version, "limits": [entry]}))


def loaded(path, account="account"):
    admission = Admission()
    state_file = StateFile(path, admission, {"": lambda: account})
    state_file.load()
    return state_file, admission


def recalled(path, account="account"):
    _, admission = loaded(path, account)
    return {pool.model: pool.upstreams[0].requests.limit for pool in admission.status()}


def learn(admission, limit=10.0, model="m"):
    now = admission.loop.time()
    [upstream] = admission.pool(model).upstreams
    upstream.recall(now, {"requests": {"limit": limit, "burst": 5.0, "uncertainty": 0.02}}, 1.0)


async def test_a_share_of_the_learned_limits_is_recalled(path):
    state_file, admission = loaded(path)
    learn(admission)
    state_file.save()
    assert recalled(path) == {"m": pytest.approx(8.0)}


async def test_every_dimension_is_recalled(path):
    write(path, tokens={"limit": 1000.0, "burst": 3000.0, "uncertainty": 0.02}, **LEARNED)
    _, admission = loaded(path)
    [upstream] = next(admission.status()).upstreams
    assert upstream.tokens.limit == pytest.approx(800.0)
    assert upstream.concurrency.limit == 6


async def test_a_smaller_share_of_an_older_limit_is_recalled_and_none_of_a_very_old_one(path):
    write(path, age=7200.0)
    assert recalled(path) == {"m": pytest.approx(5.0)}
    write(path, age=100_000.0)
    assert recalled(path) == {}


async def test_restarts_without_traffic_do_not_change_a_limit(path):
    write(path, age=600.0)
    before = path.read_bytes()
    for _ in range(3):
        state_file, _ = loaded(path)
        state_file.save()
    assert path.read_bytes() == before


async def test_a_model_without_traffic_keeps_its_age_and_its_limit(path):
    write(path, age=600.0)
    state_file, admission = loaded(path)
    learn(admission, 3.0, "busy")
    state_file.save()
    ages = {entry["model"]: time.time() - entry["learned_at"] for entry in orjson.loads(path.read_bytes())["limits"]}
    assert ages == {"m": pytest.approx(600.0, abs=5.0), "busy": pytest.approx(0.0, abs=5.0)}
    assert recalled(path) == {"m": pytest.approx(8.0), "busy": pytest.approx(2.4)}


async def test_each_account_recalls_only_its_own_limits(path):
    write(path, account="other")
    state_file, admission = loaded(path)
    assert not list(admission.status())
    learn(admission, 3.0)
    state_file.save()
    assert recalled(path, "account") == {"m": pytest.approx(2.4)}
    assert recalled(path, "other") == {"m": pytest.approx(8.0)}


async def test_after_a_key_rotation_the_next_save_uses_the_new_account(path):
    names = ["old key"]
    admission = Admission()
    state_file = StateFile(path, admission, {"": lambda: names[-1]})
    learn(admission)
    state_file.save()
    names.append("new key")
    state_file.save()
    assert recalled(path, "old key") == recalled(path, "new key") == {"m": pytest.approx(8.0)}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b'"text"', b'{"version": 1}', b'{"version": 1, "limits": [1]}', b"\xff\xfe",
        b'{"version": 1, "limits": [{"account": "account", "model": "m", "learned_at": null}]}',
    ],
)  # fmt: skip
async def test_a_damaged_file_is_ignored_with_one_warning_and_replaced(path, content, caplog):
    path.write_bytes(content)
    state_file, admission = loaded(path)
    assert not list(admission.status())
    assert caplog.text.count("it is damaged") == 1
    learn(admission)
    state_file.save()
    assert recalled(path) == {"m": pytest.approx(8.0)}


@pytest.mark.parametrize("limit", [-1, 0, "many", None, 1e300])
async def test_an_invalid_limit_is_ignored_with_a_warning(path, limit, caplog):
    write(path, requests={"limit": limit, "burst": 1.0, "uncertainty": 0.02})
    assert recalled(path) == {}
    assert "it is damaged" in caplog.text


async def test_a_file_of_another_version_is_ignored(path, caplog):
    write(path, version=2)
    assert recalled(path) == {}
    assert "version is 2" in caplog.text


async def test_the_file_is_bounded_however_many_models_callers_name(path, monkeypatch):
    monkeypatch.setattr("sidecar.state_file.MAX_LIMITS", 3)
    state_file, admission = loaded(path)
    for number in range(5):
        learn(admission, model=f"model-{number}")
        state_file.save()
    assert recalled(path).keys() == {"model-2", "model-3", "model-4"}


async def test_without_learned_limits_no_file_is_written(path):
    state_file, _ = loaded(path)
    state_file.save()
    assert not path.exists()


async def test_an_unusable_file_is_logged_once_and_the_sidecar_continues(tmp_path, caplog):
    tmp_path.joinpath("limits.json").mkdir()
    state_file, admission = loaded(tmp_path / "limits.json")
    for limit in (10.0, 11.0):
        learn(admission, limit)
        state_file.save()
    assert [record.message.partition(": ")[0].split(" ", 1)[1] for record in caplog.records] == [
        "cannot be read",
        "cannot be written",
    ]


async def test_what_a_full_disk_refuses_is_kept_and_written_when_there_is_room_again(path, monkeypatch, caplog):
    now = [1000.0]
    monkeypatch.setattr("sidecar.state_file.time.monotonic", lambda: now[0])
    state_file, admission = loaded(path)
    learn(admission)
    path.mkdir()
    for _ in range(250):  # two hours and five minutes
        state_file.save()
        now[0] += 30.0
    assert caplog.text.count("cannot be written") == 3
    path.rmdir()
    state_file.save()  # nothing was learned in between
    assert recalled(path) == {"m": pytest.approx(5.0)}  # the limit is two hours old


async def test_only_one_of_two_processes_writes_the_file_and_the_other_one_says_so_once(path, caplog):
    first, its_admission = loaded(path)
    learn(its_admission)
    first.save()
    second, admission = loaded(path)
    assert next(admission.status()).upstreams[0].requests.limit == pytest.approx(8.0)
    learn(admission, 3.0)
    for _ in range(3):
        second.save()
    assert recalled(path) == {"m": pytest.approx(8.0)}
    assert [record.args for record in caplog.records if "is only read" in record.message] == [(path,), (path,)]
    learn(its_admission, 20.0)
    first.close()
    second.save()  # the first one has ended
    assert recalled(path) == {"m": pytest.approx(2.4)}


async def test_if_two_processes_begin_without_a_file_one_of_them_becomes_the_writer(path, caplog):
    first, second = (loaded(path) for _ in range(2))
    for limit in (10.0, 11.0):
        for number, (state_file, admission) in enumerate((first, second)):
            learn(admission, limit + number / 10)
            state_file.save()
    assert recalled(path) == {"m": pytest.approx(8.8)}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["pipe", "device"])
async def test_a_file_that_is_no_regular_file_is_neither_waited_for_nor_replaced(tmp_path, kind, caplog):
    path = tmp_path / "limits.json"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/null")
    state_file, admission = loaded(path)
    learn(admission)
    state_file.save()
    assert not path.is_file()
    assert [record.message.partition(" cannot be ")[2] for record in caplog.records] == [
        "read: it is not a regular file",
        "written: it is not a regular file",
    ]


async def test_the_file_is_saved_regularly_and_atomically(path, monkeypatch):
    monkeypatch.setattr("sidecar.state_file.SAVE_EVERY_SECONDS", 0.01)
    state_file, admission = loaded(path)
    running = asyncio.create_task(state_file.run())
    learn(admission)
    async with asyncio.timeout(10):
        while not path.exists():  # noqa: ASYNC110  only the file shows it
            await asyncio.sleep(0.005)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert recalled(path) == {"m": pytest.approx(8.0)}
    assert list(path.parent.iterdir()) == [path]


def test_a_restart_under_load_costs_few_refusals_and_little_time():
    """Forty callers use a quota of 10 requests/s. The sidecar restarts with 80 % of its learned limits."""

    async def main():
        provider = Provider(
            Profile(
                requests_per_second=10, burst_requests=10, latency_seconds=0.5, refusal_latency_seconds=0.05, seed=1
            )
        )
        first = Sidecar(provider)
        await Run(first, 60.0).saturate(40)
        taken, refused = provider.counts.accepted, provider.counts.refused.total()
        second = Sidecar(provider)
        second.admission.recall("simulated", first.admission.learned("simulated"), 0.8)
        await Run(second, 10.0).saturate(40)
        return provider.counts.accepted - taken, provider.counts.refused.total() - refused

    taken, refused = clock.run(main())
    assert refused <= 3
    assert taken >= 75  # of 100: the sidecar starts with 80 % of the learned limit


async def saturate(url, client, seconds, workers=20):
    """Keep `workers` requests running for this many seconds, then disconnect. Return the statuses of the answers."""
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


async def test_a_process_restarted_under_load_causes_few_refusals_and_writes_no_key(path, provider):
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
    assert first >= 2  # the cost of a start without a file
    assert second <= 2
    assert b"sk-do-not-tell" not in path.read_bytes()
    assert process.log.count("STATE_FILE") == 0
